"""How the in-process engine computes: what a request's answer is made of, one by one or in slots."""
