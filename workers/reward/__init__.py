"""Reward functions, the processes they run in, and the role that scores rollouts with them."""
