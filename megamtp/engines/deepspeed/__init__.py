"""The one door to DeepSpeed: no other module imports it, or touches its private members and `ds_*` attributes.

members.py names those members, and version.py the DeepSpeed that has them.
"""
