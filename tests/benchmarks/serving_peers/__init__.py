"""Upnext's service beside others that answer the same question from the same parts."""
