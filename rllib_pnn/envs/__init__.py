"""Pong Soup, Atari and the labyrinth as gymnasium environments, single and vectorised. No torch, no Ray."""
