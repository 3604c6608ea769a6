"""The learning rate of `Schedule`, computed on a GPU from the number of updates done."""

import triton
import triton.language as tl


@triton.jit
def quarter_sine(share):
    """sin(pi/2 * share) for 0 <= share <= 1, to 1e-7: tl.sin would bring local memory and fp64 for large angles."""
    angle = 1.5707963267948966 * share
    square = angle * angle
    series = tl.fma(square, -1.0 / 39916800, 1.0 / 362880)
    series = tl.fma(square, series, -1.0 / 5040)
    series = tl.fma(square, series, 1.0 / 120)
    series = tl.fma(square, series, -1.0 / 6)
    return tl.fma(angle * square, series, angle)


@triton.jit
def next_rate(step, steps, cycles, learning_rate, STEP_SCHEDULE: tl.constexpr, DECAY: tl.constexpr):
    """Learning rate of the update after `step` updates (int64): `Schedule.rate_after` in fp32."""
    learning_rate = tl.where(step < steps, learning_rate, 0.0)
    if STEP_SCHEDULE:
        rate = tl.where(2 * step >= steps, learning_rate * DECAY, learning_rate)
        # 4 * step >= 3 * steps, without a product of `steps`, which is 32 bits wide.
        return tl.where(4 * (step - steps) >= -steps, learning_rate * DECAY * DECAY, rate)
    cycle = ((step + 1) * cycles - 1) // steps
    start, end = cycle * steps // cycles, (cycle + 1) * steps // cycles
    # a0 * sin^2(pi/2 * share that is left): the cosine form would cancel near the end of a cycle.
    sine = quarter_sine((end - step).to(tl.float32) / (end - start).to(tl.float32))
    return learning_rate * sine * sine


@triton.jit
def store_rate(following, rate, shown, groups):
    """`following` as the rate of the next update, and that of each group where it is shown."""
    tl.store(rate, following)
    for group in range(groups):
        tl.store(shown + 2 * group + 1, following * tl.load(shown + 2 * group))


@triton.jit
def rate_kernel(
    clock,
    rate,
    shown,
    groups,
    steps,
    cycles,
    learning_rate,
    STEP_SCHEDULE: tl.constexpr,
    DECAY: tl.constexpr,
):
    """The rates of a clock that was set from outside: the bits that the update itself would have left there."""
    following = next_rate(tl.load(clock), steps, cycles, learning_rate, STEP_SCHEDULE, DECAY)
    store_rate(following, rate, shown, groups)
