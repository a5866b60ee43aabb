"""Weightings: from the Gramian of m gradients to the weights of their sum.

All are names of `mopt`: `mopt.upgrad`. Most are functions `[m, m] -> [m]`, or
make one; those that remember something are a `mopt.Weighting`. Any of them goes
into `mopt.aggregate`. Which one to take:

| what you want | take |
|---|---|
| weights that you have tuned, or a front of several | `fixed_weights` |
| no objective to get worse for another, none to dominate | `upgrad` |
| the mean, as long as no objective gets worse | `dual_proj` |
| a common descent direction, no weight to tune | `min_norm_weights` |
| the mean, and none left far behind | `cagrad(c)` |
| losses of different scales, each treated alike | `config`, `nash_mtl` |
| fairness between the sum and the worst off | `fairgrad(alpha)` |
| no conflict and one length, near the mean | `aligned_mtl` |
| a named point of a front that is not convex | `stch(mu)` |
| what another weighting does, some objectives first | `preferred(w, p)` |
| the same, of gradients of one length | `normalized(w, 'l2')` |
| many objectives, and losses alone to look at | `famo()`, `dwa()`, `gls()` |
| scales that are learnt | `uncertainty()`, `imtl_l()`, `gradnorm()` |
| gradients of workers, some of them broken | `krum()` |
| noisy gradients | `smoothed(w, decay)`, `modo(step_size)`, `sdmgrad()` |
| a solver that runs at each n-th step | `every(w, n)` |
| what has been published with it | `pcgrad(key)`, `gradvac(key)`, `imtl_g` |
| a baseline | `mean`, `random(key)`, `random_loss()` |

What each promises is in docs/weightings.md, and in its own help.
"""
