"""The Kubernetes API as this project uses it: training jobs on many machines, and rollouts of the server.

Nothing else in the library knows of Kubernetes, and its client is imported only when something here connects.
"""
