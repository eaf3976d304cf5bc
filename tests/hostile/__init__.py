"""Hostile inputs against a real gateway process: what others feel of them, and what they leave behind."""
