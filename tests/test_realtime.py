"""Packets over a socket that breaks, and how long a pick may take where packets are lost."""

import io
import socketserver
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from obspy import Stream, Trace, UTCDateTime

from gp2vec import realtime
from gp2vec.data.embedded import SyntheticConfig, synthetic_network
from gp2vec.models.encoder import ConvLayer, EncoderConfig
from gp2vec.models.gp2vec import GP2Vec, GP2VecConfig
from gp2vec.models.transformer import ContextConfig
from gp2vec.realtime import StreamingPicker, seedlink
from gp2vec.train.picking import Picker, PickerConfig


class Server(socketserver.ThreadingTCPServer):
    "SeedLink 3 on this machine; the first connection breaks where `breaks` says, and it goes silent at `silent`."

    allow_reuse_address = daemon_threads = True

    def __init__(self, packets, breaks=None, silent=False, port=0):
        super().__init__(("127.0.0.1", port), Replay)
        self.packets, self.breaks, self.silent, self.asked = packets, breaks, silent, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"127.0.0.1:{self.server_address[1]}"


class Replay(socketserver.BaseRequestHandler):
    def handle(self):
        line, first = b"", 0
        while byte := self.request.recv(1):
            if byte not in b"\r\n":
                line += byte
                continue
            word, *rest = line.decode().split() or [""]
            line = b""
            if word == "HELLO":
                self.request.sendall(b"SeedLink v3.1 (replay)\r\nloopback\r\n")
            elif word == "END":
                break
            elif word:
                first = int(rest[0], 16) if word == "DATA" and rest else first
                self.request.sendall(b"OK\r\n")
        self.server.asked.append(first)
        for number in range(first, len(self.server.packets)):
            if number == self.server.breaks and len(self.server.asked) == 1:
                return
            self.request.sendall(b"SL%06X" % number + self.server.packets[number])
        while self.server.silent:
            time.sleep(0.2)
        self.request.sendall(b"END")


@pytest.fixture(scope="module")
def packets():
    data, file = np.random.default_rng(0).integers(-(10**6), 10**6, 2000).astype(np.int32), io.BytesIO()
    header = {"network": "XX", "station": "S01", "channel": "HHZ", "sampling_rate": 100.0}
    Trace(data, header | {"starttime": UTCDateTime(2020, 1, 1)}).write(file, format="MSEED", reclen=512)
    raw = file.getvalue()
    return [raw[i : i + 512] for i in range(0, len(raw), 512)]


@pytest.fixture
def serve():
    servers = []
    yield lambda *args, **known: servers.append(Server(*args, **known)) or servers[-1]
    for server in servers:
        server.silent = False
        server.shutdown()
        server.server_close()


def whole(traces):
    return len(Stream(list(traces)).merge(method=-1)) == 1


def test_a_connection_without_a_time_limit(packets, serve):
    got = list(seedlink(serve(packets).address, "XX_S01:HH?"))
    assert len(got) == len(packets) and whole(got)


@pytest.mark.parametrize("timeout", (None, 8.0))
def test_a_broken_connection_is_made_again_where_it_broke(packets, serve, timeout, monkeypatch):
    monkeypatch.setattr(realtime, "_RETRY", 1.0)
    server, began = serve(packets, breaks=len(packets) // 2), time.monotonic()
    got = list(seedlink(server.address, "XX_S01:HH?", timeout))
    assert len(got) == len(packets) and whole(got) and server.asked == [0, len(packets) // 2]
    assert time.monotonic() - began < 8


def test_a_server_that_is_away_for_a_while_is_waited_for(packets, serve, monkeypatch):
    monkeypatch.setattr(realtime, "_RETRY", 0.5)
    server = serve(packets, breaks=3)
    got = []
    for trace in seedlink(server.address, "XX_S01:HH?", 20.0):
        got.append(trace)
        if len(got) == 1:  # nobody listens while the rest of the first connection is read
            server.shutdown()
            server.server_close()
            again = threading.Timer(3, lambda: serve(packets, port=server.server_address[1]))
            again.start()
    assert len(got) == len(packets) and whole(got)


def test_silence_ends_what_has_a_limit_and_nothing_listening_is_an_error(packets, serve):
    server, began = serve(packets, silent=True), time.monotonic()
    got = list(seedlink(server.address, "XX_S01:HH?", 2.0))
    assert len(got) == len(packets) and 2 <= time.monotonic() - began < 6
    server.silent = False
    server.shutdown()
    server.server_close()
    with pytest.raises(Exception, match="cannot connect to SeedLink server"):
        next(seedlink(server.address, "XX_S01:HH?"))


@pytest.fixture(scope="module")
def picker():
    "A picker that knows nothing and picks all the time."
    torch.manual_seed(0)
    lenses = EncoderConfig(conv_layers=tuple(ConvLayer(16, k, 2) for k in (11, 7, 5)))
    context = ContextConfig(num_layers=1, num_heads=2, positions="rotary", dropout=0.0)
    config = GP2VecConfig.preset("tiny", embed_dim=16, feature_encoder=lenses, context_encoder=context)
    return Picker(GP2Vec(config), PickerConfig(width=8, window_length=20.0, thresholds=(1e-3, 1e-3))).eval()


PACKET = 4.0  # s


def replay(picker, lost=(), late=(), **settings):
    "Times of picks, and how long after them the packet ended that brought them, both in s; the gap is 80 to 88 s."
    stream = synthetic_network(SyntheticConfig(stations=1, events=3, duration=200.0)).stream
    begin, live, found = stream[0].stats.starttime, StreamingPicker(picker, **settings), []
    tables = []
    packets = [t.slice(begin + PACKET * k, begin + PACKET * (k + 1) - 0.01) for k in range(48) for t in stream]
    gap = [p for p in packets if p.stats.channel[-1] in lost and 79.9 < p.stats.starttime - begin < 87.9]
    packets = [p for p in packets if not any(p is one for one in gap)]
    if late:
        packets = sorted(packets + gap, key=lambda p: p.stats.endtime + (late if any(p is g for g in gap) else 0))
    newest = begin
    for packet in packets:
        newest = max(newest, packet.stats.endtime)
        tables.append(live.feed(packet).table)
        found += [(t / 1e9 - begin.timestamp, newest.timestamp - t / 1e9) for t in tables[-1].time]
    return np.array(found).T, live, pd.concat(tables)


@pytest.mark.parametrize("lost", ("", "Z", "ZNE"))
@pytest.mark.parametrize("max_wait", (5.0, 30.0))
def test_no_pick_waits_longer_than_is_said(picker, lost, max_wait):
    "At the start and behind a gap a window has to fill, what lies before waits for `max_wait` and a hop."
    (at, waited), live, _ = replay(picker, lost, delay=3.0, hop=2.0, max_wait=max_wait)
    first, behind = at < 25, (at > 88) & (at < 115) & bool(lost)
    before = (at > 70) & (at <= 88) & bool(lost)
    usual, filling = live.latency + PACKET, picker.config.window_length + live.hop + PACKET
    assert len(at) > 20 and first.any() and (not lost or behind.any() and before.any())
    assert waited[~first & ~behind & ~before].max() <= usual
    assert waited[first | behind].max() <= filling
    assert not lost or waited[before].max() <= usual + max_wait + live.hop


@pytest.mark.parametrize("late", (20.0, 28.0, 36.0))
def test_a_packet_that_comes_after_all_tells_nothing_twice(picker, late):
    "A gap that is closed when the picks before it are out does not bring them again."
    *_, table = replay(picker, "ZNE", late=late, delay=3.0, hop=2.0, max_wait=5.0)
    for _, group in table.groupby("phase"):
        assert len(group) > 10 and np.diff(np.sort(group.time)).min() > 0.1e9


@pytest.mark.parametrize("lost", ("", "ZNE"))
def test_picks_of_a_phase_keep_their_distance(picker, lost):
    "Also where each peak has a higher one near it, and which of them stay hangs on peaks long gone."
    table = replay(picker, lost)[2]
    for phase, mine in table.groupby("phase"):
        apart = np.diff(np.sort(mine.time.to_numpy())) / 1e9
        assert len(mine) > 20 and apart.min() >= picker.config.minimum_distance - 0.011, (phase, apart.min())


@pytest.mark.parametrize("hours", (1, 24 * 365))
@pytest.mark.parametrize("count", (1, 3))
def test_a_packet_dated_ahead_deafens_nobody(picker, hours, count):
    "One, or one of each component, with a wrong date: the picks are those without it."
    stream = synthetic_network(SyntheticConfig(stations=1, events=3, duration=200.0)).stream
    begin, tables = stream[0].stats.starttime, []
    packets = [t.slice(begin + PACKET * k, begin + PACKET * (k + 1) - 0.01) for k in range(48) for t in stream]
    for wrong in (False, True):
        live, found = StreamingPicker(picker), []
        for number, packet in enumerate(packets):
            found.append(live.feed(packet).table)
            if wrong and 60 <= number < 60 + count:
                ahead = packet.copy()
                ahead.stats.starttime += 3600 * hours
                found.append(live.feed(ahead).table)
        tables.append(pd.concat([*found, live.finish().table], ignore_index=True))
    assert len(tables[0]) > 20 and tables[0].equals(tables[1])


def test_behind_an_outage_of_an_hour_it_goes_on(picker):
    "The packets themselves agree that it is later."
    stream = synthetic_network(SyntheticConfig(stations=1, events=3, duration=200.0)).stream
    begin, live, found = stream[0].stats.starttime, StreamingPicker(picker), []
    for k in range(48):
        for trace in stream:
            packet = trace.slice(begin + PACKET * k, begin + PACKET * (k + 1) - 0.01)
            packet.stats.starttime += 3600 * (k >= 24)
            found.append(live.feed(packet).table)
    table = pd.concat([*found, live.finish().table])
    later = (table.time - begin.ns) / 1e9 - 3600
    assert (later < -3500).sum() > 10 and ((later > 96) & (later < 192)).sum() > 10
