"""Upnext beside RecTools, RePlay and RecBole."""
