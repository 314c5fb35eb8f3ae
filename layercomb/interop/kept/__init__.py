"""Beside `weight_cache`: the folder of what is kept, and the files that it is made of."""
