"""The stream of training rows: mixture of data sets, packing, and its exact position."""
