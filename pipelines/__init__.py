"""The pipeline of the seven components: wiring, placement on a cluster, compiling and running on this machine."""
