"""The HTTP side: parse, call, render. One module a noun."""
