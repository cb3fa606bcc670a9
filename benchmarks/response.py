"""Turn a channel-day of 40 Hz from counts into velocity: ObsPy's remove_response, gp2vec with the curve kept.

Both sides take the mean off and keep the same band. The curve is asked of ObsPy's inventory once and kept, as
StationMetadataManager does; it is the same for every day of an epoch, so it is not timed.
"""

from functools import lru_cache

import numpy as np
import obspy
from measure import compare, parser

from gp2vec.data.preprocessing import remove_response

PRE_FILT = (0.05, 0.1, 16.0, 19.0)


def day() -> obspy.Trace:
    "Swell and noise of one component."
    random, t = np.random.default_rng(0), np.arange(3_456_000) / 40
    x = 5000 * np.sin(2 * np.pi * 0.15 * t) + random.normal(0, 50, t.size)
    example = obspy.read()[0].stats
    header = {name: example[name] for name in ("network", "station", "location", "channel", "starttime")}
    return obspy.Trace(x.round().astype(np.int32), header | {"sampling_rate": 40.0})


if __name__ == "__main__":
    options, trace, inventory = parser(__doc__).parse_args(), day(), obspy.read_inventory()

    @lru_cache(maxsize=4)
    def curve(frequencies: bytes) -> np.ndarray:
        response = inventory.get_response(trace.id, trace.stats.starttime)
        return response.get_evalresp_response_for_frequencies(np.frombuffer(frequencies), output="VEL")

    def ours() -> np.ndarray:
        counts = (trace.data - trace.data.mean()).astype(np.float32)
        return remove_response(counts, 40.0, lambda frequencies: curve(frequencies.tobytes()), PRE_FILT)

    def theirs() -> np.ndarray:
        options = dict(output="VEL", pre_filt=PRE_FILT, water_level=None, taper=False)
        return trace.copy().remove_response(inventory, **options).data

    def gate(results: dict) -> str:
        a, b = results["gp2vec"], results["ObsPy"]
        error = np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))
        assert error < 1e-4, error
        return f"rel. rms {error:.1e} from ObsPy"

    sides = {"gp2vec": ours, "ObsPy": theirs}
    compare("response of a channel-day", sides, options.rounds, gate, options.json)
