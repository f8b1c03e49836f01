"""The only package that imports DeepSpeed, or uses its private members and `ds_*` attributes.

members.py lists those members, and version.py the version of DeepSpeed that has them.
"""
