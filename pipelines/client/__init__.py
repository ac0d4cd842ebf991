"""What `python -m pipelines` does with a Kubeflow Pipelines server: connect, upload, submit, wait, schedule."""
