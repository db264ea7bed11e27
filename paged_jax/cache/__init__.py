"""The memory and who owns it: sizes, page tables, pool, handles, and what a layer sees of a step."""
