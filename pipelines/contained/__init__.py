"""Pipelines in real containers on this machine: `kfp.local` over the API of Docker or Podman, services on a network."""
