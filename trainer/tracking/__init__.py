"""What a person sees of a run: timers, metrics, tables, and the report. Nothing here imports torch, Ray or vLLM."""
