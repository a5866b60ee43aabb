"""Four CPU devices, so that pmap is real, and strict shapes."""

import hypothesis
import jax

jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# A busy machine is no failure.
hypothesis.settings.register_profile('patient', deadline=None)
hypothesis.settings.load_profile('patient')
