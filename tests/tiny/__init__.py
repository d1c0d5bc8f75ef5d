"""Builders of tiny models of the real classes, and of LoRAs for them: one place for all tests."""
