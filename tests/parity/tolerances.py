"""How close is close enough, in one place, and why.

All comparisons are in float32 on a CPU. What is compared is relative to the largest magnitude of
the reference's array ("its scale") unless stated. Where a comparison has the reference in float64
beside it, errors are measured from that, and the bound is the number below or, where float32
itself is worse, `OWN` times the error of the reference's own float32 against its float64.

One run is a poor estimate of that error: where one early rounding grows until it is all there is
to see, a second run of the same program may be off by any multiple of the first. So where the
first run does not allow for an error of ours, the reference runs again, up to `ORDERS` times, on
the same input with its sums taken in other orders (see rounding.py), which is as far from the
first as one with other libraries or threads; its own error is the largest of these runs'. A run
that takes another decision than float64 (see `DECIDED`) is left out.
"""

# One module: some hundred roundings of 6e-8, summed in another order than torch sums them. Those
# deepest, memory attention and the decoder, have the reference in float64 beside them.
MODULE = 1e-5
# Outputs of a whole clip: every frame reads memories that were computed from earlier errors.
# Binary masks are the same but for pixels whose logit is within the bound on logits of zero.
ROLLOUT = 1e-4
# Each loss term and the total: sums over the outputs of a clip.
LOSS = 1e-4
# A pixel whose logit rounding puts on either side of 0 counts in the IoU that its prediction is
# taught, or not: what such pixels may be worth is left out, and is at most this share of the loss.
DOUBTFUL = 1e-3
# Gradient of one parameter, error and scale as Euclidean norms; and the median over parameters.
GRADIENT = 1e-3
GRADIENT_MEDIAN = 1e-4
# In place of all of the above where float32 is worse: two programs that round independently are
# off by as much as each other, and their largest of many errors differ by less than this factor.
OWN = 2.0
ORDERS = 8
# A parameter whose float64 gradient is below this share of the gradient of all has none (a bias
# of keys moves all logits of a softmax alike): there float32 may leave no more than rounding,
# a share of the gradient of all that is absolute.
NO_GRADIENT = 1e-12
NO_GRADIENT_LEFT = 1e-7
# Change of a parameter by an optimizer step, in units of its learning rate. Adam divides the mean
# of a weight's gradients by their root mean square s: if those are known but for e (the largest
# errors of that parameter's gradients, which are held to the bounds above, averaged as Adam
# averages), the change is known but for 2 e / s. That, where it is more, is the bound: for weights
# whose gradient is above its noise it is not.
STEP = 0.01
ABOVE_NOISE = 0.5  # at least this share of all weights
# The weight after the step is a float32 number near the weight: one unit in its last place.
LAST_PLACE = 2.0**-23

# Decisions are not compared where they are a coin's: a clip is taken for a test only if in
# float64 everything that is compared with a threshold (object scores, predicted IoUs with each
# other, losses of masks, IoU errors with zero) is at least this many times as far from it as
# float32 and float64 differ.
DECIDED = 4.0

# bfloat16: our distance from our float32 is at most so many times the reference's from its own.
RATIO = 1.5
DIFFERS = 1e-4  # the least that the reference must differ, or nothing is compared
SILENT = 1e-6  # norms below this share of the largest are the rounding of what is zero

# Gates whose input float32 cannot tell from where they turn (see gates.py): how many may be
# turned in one clip; the least that one changes the gradient of the weights before it, of its norm,
# to be thought of; and the share of a row's difference that it may leave.
MOST_GATES = 40
WORTHWHILE = 2e-5
EXPLAINS = 0.7

# Prompts are drawn, so distributions are compared: the probability with which a test calls equal
# ones different. A probability that is off by 0.05 is seen in nearly every run, the reach of a
# box's noise if it is off by a hundredth.
FALSE_ALARM = 1e-5

# The recipe's numbers. Relative: our schedules are computed in float32; a tenth of a rate is
# computed there and written here.
SCHEDULE = 1e-5
COMPUTED = 1e-12

# The reference with its sums in other orders, in float64, where order makes no difference.
EQUAL = 1e-9
