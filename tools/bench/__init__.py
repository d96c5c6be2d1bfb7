"""How fast whole encoders, and single ops, run beside what one would use instead.

models    published encoders, built with random weights
variants  eager, torch.compile in its modes, torchao, graphquant
timing    calls in turns, by CUDA events
encoders  models x batch x variants
ops       one op beside its alternatives, or beside a copy of the same bytes
records   what was measured, as JSON; which baseline counts, which speed-up may be told
write     records as tables, Markdown and a chart
"""
