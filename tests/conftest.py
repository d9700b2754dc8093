"""Property tests draw the same examples every time; ``HYPOTHESIS_PROFILE=explore`` draws new ones.

``unshrunk``: a failing example is not made smaller, where it only matters that a test fails (`tests.mutants`).
"""

import os

from hypothesis import Phase, settings

# Bits are held by these tests, and whose products are the quicker here is not their matter.
os.environ.setdefault("TUNA_KERNELS_CPU_PRODUCTS", "own")

settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.register_profile("unshrunk", derandomize=True, phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
