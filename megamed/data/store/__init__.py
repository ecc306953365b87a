"""The volume store: one folder a series, and an index over all."""
