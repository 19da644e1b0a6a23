"""The progressive network inside RLlib: module, tasks, runners, growth. The only floor that knows RLlib."""
