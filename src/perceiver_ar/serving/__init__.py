"""A run as a server: the completions interface of OpenAI, and a web page.

Only this package imports web libraries (extra [serve]). One thread owns the model (engine.py); the event loop never
computes with it.
"""
