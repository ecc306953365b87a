"""Helpers for the tests: gloo ranks that start once, tiny models, synthetic studies. Nothing else imports them."""
