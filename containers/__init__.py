"""The container images: their Containerfiles and pinned packages, and the program that builds and inspects them."""
