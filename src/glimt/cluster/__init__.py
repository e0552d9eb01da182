"""Many engines behind one port, on Ray Serve: the server's own application in every replica.

affinity.py  which replica a request goes to, and why; knows no Ray
plan.py      what was asked for, checked, and as text for other processes; knows no Ray
router.py    affinity as a request router of Serve
replica.py   one engine, with the server's application around it
ingress.py   the door: keys, limits, retries, and the way to a replica and back
deploy.py    Ray started and the application deployed

Nothing here imports Ray before a module that needs it is imported.
"""
