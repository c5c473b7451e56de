"""The operator's page: what came in, what waits or failed and why, replay, VAEs, sending, help.

The server renders complete HTML pages, whose forms work without a script. The one script sends
files, refreshes figures, and shows times in the viewer's zone.
"""
