"""The command: one file per verb or pair of verbs, options and tables only; what they do stands in verbs.py."""
