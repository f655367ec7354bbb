"""What becomes of verl's keys here: lives here, alias, accepted without effect, or refused.

`tables` holds one rule per key or family of keys, `decisions` what takes other keys to decide, `classify` finds the
rule of a key, `translate` applies them to a command line and to YAML. docs/verl.md shows the tables to people.
"""
