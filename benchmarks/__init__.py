"""Side by side with peers: one harness, one set of arms, one report.

`python -m benchmarks.kernels` compares log-prob and ranking-loss kernels, `python -m benchmarks.step`
compares a whole training step with the baseline's. Both write JSON, a Markdown table and pictures;
`README.md` of this folder says what each figure means.
"""
