"""Automatic1111 and Forge: their guidance read through their own callbacks, and their model asked again."""
