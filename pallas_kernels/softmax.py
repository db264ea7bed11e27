"""Numbers of a softmax that kernels update block by block, in base 2."""

LOG2E = 1.4426950408889634
MASKED = -1e30  # score of a key that is not seen; finite, so that a difference of two is not NaN
FLOOR = -1e20  # the running maximum before the first key: exp2(MASKED - FLOOR) is 0
