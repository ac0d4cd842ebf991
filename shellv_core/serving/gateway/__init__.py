"""Many models behind one API: in this process, in processes of their own, or behind servers elsewhere."""
