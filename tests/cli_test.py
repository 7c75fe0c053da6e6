"""The program as people use it: exit status, formats, files, sweeps, and results against attention in plain Python.

    python3 tests/cli_test.py PATH_TO_TESSERA

Sizes are tiny (40 tokens, blocks of 16: two whole blocks and a ragged one), as the kernels have tests of their own;
what is tested here is everything between the command line and the library.
"""

import csv
import io
import json
import math
import os
import pathlib
import platform
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM = sys.argv.pop(1) if len(sys.argv) > 1 else None
COMMANDS = ["demo", "attend", "pattern", "analyze", "bench", "check", "info"]
TINY_BENCH = ["bench", "--seq", "64", "--heads", "1", "--head-dim", "8", "--block", "16", "--repeat", "1"]
BENCH_KEYS = """pass dtype batch heads kv_heads seq head_dim block pattern density threads isa seconds gflops
    peak_gflops fraction_of_peak scratch_bytes peak_rss_bytes""".split()


def run(*args, **options):
    return subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True, timeout=300, **options)


def write_safetensors(path, tensors):
    """tensors: {name: (shape, floats)}, as fp32."""
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        raw = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    """{name: (dtype, shape, floats)}; bf16 is a float's upper half."""
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    result = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        data = raw[8 + size + begin : 8 + size + end]
        if info["dtype"] == "BF16":
            data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        code = {"F16": "e", "F64": "d"}.get(info["dtype"], "f")
        values = struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)
        result[name] = (info["dtype"], info["shape"], values)
    return result


def write_npy(path, shape, values):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    pathlib.Path(path).write_bytes(
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", len(header))
        + header.encode()
        + struct.pack(f"<{len(values)}f", *values)
    )


def read_npy(path):
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack("<H", raw[8:10])[0]
    header = eval(raw[10 : 10 + size].decode())  # our own file
    data = raw[10 + size :]
    return header["shape"], struct.unpack(f"<{len(data) // 4}f", data)


def as_fp32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


class Sample:
    """Random q, k, v in [B, H, S, D] or [B, S, H, D], and attention over kept blocks in plain Python."""

    def __init__(self, heads=2, kv_heads=1, seqlen_q=40, seqlen_k=40, dim=4, dim_v=3, layout="bhsd", seed=0):
        self.heads, self.kv_heads, self.layout = heads, kv_heads, layout
        self.seqlen_q, self.seqlen_k, self.dim, self.dim_v = seqlen_q, seqlen_k, dim, dim_v
        rng = random.Random(seed)
        self.tensors = {}
        for name, h, s, d in (
            ("q", heads, seqlen_q, dim),
            ("k", kv_heads, seqlen_k, dim),
            ("v", kv_heads, seqlen_k, dim_v),
        ):
            shape = (1, h, s, d) if layout == "bhsd" else (1, s, h, d)
            self.tensors[name] = (shape, [as_fp32(rng.gauss(0, 1)) for _ in range(h * s * d)])

    def row(self, name, head, i):
        shape, values = self.tensors[name]
        h, s = (shape[1], shape[2]) if self.layout == "bhsd" else (shape[2], shape[1])
        start = ((head * s + i) if self.layout == "bhsd" else (i * h + head)) * shape[3]
        return values[start : start + shape[3]]

    def attention(self, pattern, causal=False, left=10**9, right=10**9, scale=None, dilation=None):
        """out in the layout of the sample, lse [H, Sq]; pattern as its JSON, or dilation as [(w, r), ...]."""
        scale = 1 / math.sqrt(self.dim) if scale is None else scale
        shift = self.seqlen_k - self.seqlen_q
        out, lse = {}, []
        for h in range(self.heads):
            for i in range(self.seqlen_q):
                if dilation:  # LongNet: one softmax over the keys of all (w, r)
                    keys = [
                        j
                        for w, r in dilation
                        for j in range(self.seqlen_k)
                        if i // w == j // w and i % w % r == j % w % r == h % r
                    ]
                else:
                    entry = pattern["heads"][h if len(pattern["heads"]) > 1 else 0]
                    r = i // pattern["block_q"]
                    columns = set(entry["indices"][entry["indptr"][r] : entry["indptr"][r + 1]])
                    keys = [j for j in range(self.seqlen_k) if j // pattern["block_k"] in columns]
                keys = [j for j in keys if -right <= i + shift - j <= left and (not causal or j <= i + shift)]
                kv = h * self.kv_heads // self.heads
                q = self.row("q", h, i)
                scores = [scale * sum(a * b for a, b in zip(q, self.row("k", kv, j))) for j in keys]
                if not keys:
                    out[h, i], total = [0.0] * self.dim_v, None
                else:
                    top = max(scores)
                    weights = [math.exp(s - top) for s in scores]
                    total = top + math.log(sum(weights))
                    out[h, i] = [
                        sum(w * self.row("v", kv, j)[d] for w, j in zip(weights, keys)) / sum(weights)
                        for d in range(self.dim_v)
                    ]
                lse.append(-math.inf if total is None else total)
        order = (
            [(h, i) for h in range(self.heads) for i in range(self.seqlen_q)]
            if self.layout == "bhsd"
            else [(h, i) for i in range(self.seqlen_q) for h in range(self.heads)]
        )
        return [x for key in order for x in out[key]], lse


class CliTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dir = pathlib.Path(folder.name)

    def ok(self, *args, status=0, quiet=True):
        result = run(*args)
        self.assertEqual(result.returncode, status, f"{args}\n{result.stdout}\n{result.stderr}")
        if quiet:
            self.assertEqual(result.stderr, "", args)
        return result.stdout

    def refused(self, status, *args, says=None):
        result = run(*args)
        self.assertEqual(result.returncode, status, f"{args}\n{result.stdout}\n{result.stderr}")
        self.assertTrue(result.stderr.startswith("tessera: "), result.stderr)
        self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
        if status == 2:
            self.assertEqual(result.stdout, "", args)
        if says:
            self.assertIn(says, result.stderr)

    def assertNear(self, got, want, tolerance):
        self.assertEqual(len(got), len(want))
        for g, w in zip(got, want):
            if not (g == w or abs(g - w) <= tolerance):
                self.fail(f"{g} is not {w} within {tolerance}")

    # ---- help, version, usage ----

    def test_help_everywhere(self):
        top = self.ok("--help")
        for command in COMMANDS:
            self.assertIn(f"\n  {command} ", top)
        for args in [["--help"]] + [[command, "--help"] for command in COMMANDS]:
            text = self.ok(*args)
            self.assertIn("Example", text)
            self.assertIn("  tessera ", text.split("Example")[1])
            if args[0] != "--help":
                self.assertIn("--format", text)
            for line in text.splitlines():
                self.assertLessEqual(len(line), 110, line)

    def test_version(self):
        self.assertRegex(self.ok("--version"), r"^tessera \d+\.\d+\.\d+\n$")

    def test_suggestions(self):
        for args, words in (
            (["analyse"], "no command analyse; allowed: .*; did you mean analyze[?]"),
            (["xyzzy"], r"no command xyzzy; allowed: demo, .*, man \(try"),
            (["bench", "--isa", "avx51"], "--isa: got avx51; .*; did you mean avx512[?]")
            if platform.machine() == "x86_64"
            else (["bench", "--isa", "nen"], "--isa: got nen; .*; did you mean neon[?]"),
            (["pattern", "--pattern", "local_windw"], "--pattern: got local_windw; .*; did you mean local_window[?]"),
            (["bench", "--dtype", "fp23"], "--dtype: got fp23; .*; did you mean fp32[?]"),
            (["info", "--format", "jsn"], "--format: got jsn; .*; did you mean json[?]"),
            (["bench", "--seqq", "3"], "got --seqq; .*; did you mean --seq[?]"),
            (["bench", "--pas=fwd"], "got --pas=fwd; .*; did you mean --pass[?]"),
        ):
            self.refused(2, *args)
            self.assertRegex(run(*args).stderr, words)

    def test_help_as_a_command(self):
        self.assertEqual(self.ok("help"), self.ok("--help"))
        for command in COMMANDS:
            self.assertEqual(self.ok("help", command), self.ok(command, "--help"))
        self.refused(2, "help", "bnch", says="did you mean bench?")

    def test_usage_errors_are_status_2(self):
        sample = self.dir / "x.safetensors"
        write_safetensors(sample, Sample().tensors)
        for args in (
            [],
            ["nothing"],
            ["--nothing"],
            ["bench", "--nothing"],
            ["bench", "extra"],
            ["bench", "--pass", "sideways"],
            ["bench", "--pass", "fwd,bwd"],
            ["bench", "--dtype", "int8"],
            ["bench", "--seq", "abc"],
            ["bench", "--seq", "0"],
            ["bench", "--seq", "-5"],
            ["bench", "--seq"],
            ["bench", "--isa", "pentium"],
            ["bench", "--heads", "8", "--kv-heads", "3"],
            ["bench", "--pattern", "nothing"],
            ["bench", "--density", "0"],
            ["bench", "--density", "1.5"],
            ["bench", "--density", "nan"],
            ["bench", "--block", "17"],
            ["bench", "--block", "512"],
            ["bench", "--format", "xml"],
            ["bench", "--repeat", "0"],
            ["bench", "--threads", "-1"],
            ["bench", "--seq", "64", "--pattern", "dense", "--density", "0.5"],
            ["bench", "--seq", "64", "--pattern", "dilated_sparse", "--stride", "2"],
            ["pattern"],
            ["pattern", "--pattern", "dense"],
            ["pattern", "--seq", "64"],
            ["pattern", "--seq", "64", "--pattern", "dense", "--window", "5"],
            ["pattern", "--seq", "64", "--pattern", "dense,random", "--output", self.dir / "p.json"],
            ["pattern", "--seq", "64", "--pattern", "dilated_segments", "--segment-lengths", "32"],
            ["attend"],
            ["attend", "--input", sample],
            ["attend", "--pattern", "dense"],
            ["attend", "--input", sample, "--q", sample, "--pattern", "dense"],
            ["attend", "--q", sample, "--pattern", "dense"],
            ["attend", "--input", sample, "--pattern", "dense,random"],
            ["attend", "--input", sample, "--pattern", "dense", "--pattern-file", "p.json"],
            ["attend", "--input", sample, "--pattern", "dense", "--scale", "nan"],
            ["attend", "--input", sample, "--pattern", "dense", "--softcap", "-1"],
            ["attend", "--input", sample, "--pattern", "dense", "--layout", "sbhd"],
            ["attend", "--input", sample, "--pattern", "dense", "--segment-lengths", "32"],
            ["attend", "--input", sample, "--segment-lengths", "32,64", "--dilation-rates", "1"],
            ["attend", "--input", sample, "--pattern", "dense", "--dilation-rates", "1"],
            ["attend", "--input", sample, "--segment-lengths", "32", "--dilation-rates", "0"],
            [
                "attend",
                "--input",
                sample,
                "--pattern-file",
                "p.json",
                "--segment-lengths",
                "32",
                "--dilation-rates",
                "1",
            ],
            ["attend", "--input", sample, "--pattern", "dense", "--dtype", "bf16", "--output", "o.npy"],
            ["analyze"],
            ["analyze", "--input", sample, "--target-coverage", "2"],
            ["bench", "--seq", "9223372036854775808"],
            ["bench", "--seq", "64x"],
            ["bench", "--seq", "1e3"],
            ["bench", "--seq", "64", "--segment-lengths", "32,64", "--dilation-rates", "1"],
            ["bench", "--seq", "64", "--segment-lengths", "32", "--dilation-rates", "2", "--pass", "decode"],
            ["bench", "--pass", "decode", "--queries", "17"],
            ["bench", "--threads", "99999"],
            ["pattern", "--seq", "64", "--pattern", "random", "--seed", "-1"],
            ["attend", "--input", sample, "--pattern", "dense", "--output", sample],
            ["attend", "--input", sample, "--pattern", "dense", "--output", "o.txt"],
            ["bench", "--seq", "64", "--queries", "3"],
            ["check", "--isa", "auto"],
            ["check", "--cases", "-1"],
            ["check", "--isa", "nothing"],
            ["check", "--pass", "sideways"],
            ["info", "--format", "yaml"],
        ):
            with self.subTest(args=args):
                self.refused(2, *args)
        self.refused(2, "bench", "--pass", "sideways", says="fwdbwd")
        self.refused(
            2, "attend", "--input", sample, "--pattern", "random", "--segment-lengths", "32", says="--dilation-rates"
        )

    # ---- formats ----

    def test_every_command_in_every_format(self):
        sample = self.dir / "x.safetensors"
        write_safetensors(sample, Sample().tensors)
        commands = {
            "pattern": ["pattern", "--seq", "64", "--pattern", "local_window,random", "--block", "16"],
            "bench": TINY_BENCH + ["--pattern", "dense"],
            "attend": ["attend", "--input", sample, "--pattern", "dense", "--block", "16"],
            "analyze": ["analyze", "--input", sample, "--block", "16", "--density", "0.5,1"],
            "search": ["analyze", "--input", sample, "--block", "16", "--target-coverage", "0.5"],
            "check": ["check", "--cases", "2"],
            "info": ["info", "--no-peaks"],
        }
        for name, args in commands.items():
            with self.subTest(command=name):
                value = json.loads(self.ok(*args, "--format", "json"))
                self.assertIsInstance(value, dict if name in ("attend", "check", "info") else list)
                rows = list(csv.reader(io.StringIO(self.ok(*args, "--format", "csv"))))
                self.assertGreaterEqual(len(rows), 2)
                self.assertEqual({len(row) for row in rows}, {len(rows[0])})
                self.assertEqual(len(set(rows[0])), len(rows[0]))
                self.assertGreater(len(self.ok(*args).splitlines()), 1)

    def test_json_and_csv_hold_the_same(self):
        args = ["pattern", "--seq", "100", "--pattern", "strided", "--stride", "2", "--block", "16"]
        record = json.loads(self.ok(*args, "--format", "json"))[0]
        row = next(csv.DictReader(io.StringIO(self.ok(*args, "--format", "csv"))))
        for key, value in record.items():
            if isinstance(value, float) and key != "build_seconds":
                self.assertEqual(float(row[key]), value, key)
            elif isinstance(value, int) and not isinstance(value, bool):
                self.assertEqual(int(row[key]), value, key)

    # ---- attend ----

    def pattern_json(self, sample, *args):
        path = self.dir / "pattern.json"
        self.ok(
            "pattern",
            "--seq",
            sample.seqlen_q,
            "--seq-k",
            sample.seqlen_k,
            "--heads",
            sample.heads,
            *args,
            "--output",
            path,
        )
        return path, json.loads(path.read_text())

    def test_attend_is_attention(self):
        patterns = [
            ["--pattern", "dense"],
            ["--pattern", "random", "--density", "0.4", "--pattern-heads", "2"],
            ["--pattern", "local_window", "--window", "20"],
        ]
        for layout in ("bhsd", "bshd"):
            for causal in (False, True):
                for lengths in ((40, 40), (17, 50), (50, 17)):
                    sample = Sample(layout=layout, seqlen_q=lengths[0], seqlen_k=lengths[1])
                    path = self.dir / "x.safetensors"
                    write_safetensors(path, sample.tensors)
                    for pattern in patterns:
                        args = [*pattern, "--block", "16"] + (["--causal"] if causal else [])
                        with self.subTest(layout=layout, lengths=lengths, args=args):
                            file, kept = self.pattern_json(sample, *args)
                            want_out, want_lse = sample.attention(kept, causal)
                            output = self.dir / "out.safetensors"
                            for given in (args, ["--pattern-file", file] + (["--causal"] if causal else [])):
                                self.ok(
                                    "attend", "--input", path, "--layout", layout, *given, "--check", "--output", output
                                )
                                got = read_safetensors(output)
                                shape = list(sample.tensors["q"][0])
                                shape[3] = sample.dim_v
                                self.assertEqual(got["out"][:2], ("F32", shape))
                                self.assertEqual(got["lse"][:2], ("F32", [1, sample.heads, sample.seqlen_q]))
                                self.assertNear(got["out"][2], want_out, 2e-6)
                                self.assertNear(got["lse"][2], want_lse, 2e-6)

    def test_windows(self):
        """--window is the pattern's where it has one, token-exact elsewhere; --token-window is always token-exact."""
        sample = Sample()
        path, output = self.dir / "x.safetensors", self.dir / "out.safetensors"
        write_safetensors(path, sample.tensors)
        for causal in (False, True):
            flags = ["--block", "16"] + (["--causal"] if causal else [])
            left, right = (7, 10**9) if causal else (3, 3)
            for pattern, window in (
                (["--pattern", "dense"], ["--window", "7"]),
                (["--pattern", "dense"], ["--token-window", "7"]),
                (["--pattern", "local_window", "--window", "20"], ["--token-window", "7"]),
            ):
                with self.subTest(causal=causal, pattern=pattern, window=window):
                    kept = self.pattern_json(sample, *pattern, *flags)[1]
                    self.ok("attend", "--input", path, *pattern, *window, *flags, "--output", output)
                    self.assertNear(
                        read_safetensors(output)["out"][2], sample.attention(kept, causal, left, right)[0], 2e-6
                    )
                    self.ok(
                        "attend",
                        "--input",
                        path,
                        "--pattern-file",
                        self.dir / "pattern.json",
                        "--token-window",
                        "7",
                        *flags[2:],
                        "--output",
                        output,
                    )
                    self.assertNear(
                        read_safetensors(output)["out"][2], sample.attention(kept, causal, left, right)[0], 2e-6
                    )

    def test_attend_dilated(self):
        """Clipped and ragged segments, rates that leave tokens to no one; dense and with a window inside."""
        path, output = self.dir / "x.safetensors", self.dir / "out.safetensors"
        for layout in ("bhsd", "bshd"):
            sample = Sample(heads=4, kv_heads=2, layout=layout)
            write_safetensors(path, sample.tensors)
            for dilation in ([(16, 1), (64, 3)], [(12, 5)]):
                lists = [
                    "--segment-lengths",
                    ",".join(str(w) for w, _ in dilation),
                    "--dilation-rates",
                    ",".join(str(r) for _, r in dilation),
                ]
                for pattern, left in ([], 10**9), (["--pattern", "dense", "--window", "9"], 9):
                    with self.subTest(layout=layout, dilation=dilation, pattern=pattern):
                        record = json.loads(
                            self.ok(
                                "attend",
                                "--input",
                                path,
                                "--layout",
                                layout,
                                *pattern,
                                *lists,
                                "--causal",
                                "--block",
                                "16",
                                "--check",
                                "--output",
                                output,
                                "--format",
                                "json",
                            )
                        )
                        want_out, want_lse = sample.attention(None, True, left, dilation=dilation)
                        got = read_safetensors(output)
                        self.assertNear(got["out"][2], want_out, 2e-6)
                        self.assertNear(got["lse"][2], want_lse, 2e-6)
                        self.assertEqual(record["check"], "passed")
                        self.assertEqual(record["dilation_rates"], lists[3])
            # A block pattern that takes the same flags stays one; a pattern inside has its budget there.
            self.ok(
                "attend",
                "--input",
                path,
                "--layout",
                layout,
                "--pattern",
                "dilated_segments",
                "--block",
                "16",
                "--segment-lengths",
                "32",
                "--dilation-rates",
                "2",
                "--check",
                "--output",
                output,
            )
            self.assertNotIn(
                "segment_lengths",
                json.loads(
                    self.ok(
                        "attend",
                        "--input",
                        path,
                        "--layout",
                        layout,
                        "--pattern",
                        "dilated_segments",
                        "--block",
                        "16",
                        "--segment-lengths",
                        "32",
                        "--dilation-rates",
                        "2",
                        "--format",
                        "json",
                    )
                ),
            )
            self.ok(
                "attend",
                "--input",
                path,
                "--layout",
                layout,
                "--pattern",
                "dilated_sparse",
                "--density",
                "0.5",
                "--block",
                "16",
                "--segment-lengths",
                "32,64",
                "--dilation-rates",
                "1,2",
                "--dtype",
                "bf16",
                "--check",
                "--output",
                output,
            )

    def test_attend_npy_and_scale(self):
        sample = Sample(layout="bshd", heads=4, kv_heads=2)
        for name, (shape, values) in sample.tensors.items():
            write_npy(self.dir / f"{name}.npy", shape, values)
        files = [x for name in "qkv" for x in (f"--{name}", self.dir / f"{name}.npy")]
        kept = self.pattern_json(sample, "--pattern", "dense", "--block", "16")[1]
        self.ok(
            "attend",
            *files,
            "--layout",
            "bshd",
            "--pattern",
            "dense",
            "--block",
            "16",
            "--scale",
            "0.3",
            "--output",
            self.dir / "out.npy",
        )
        want_out, want_lse = sample.attention(kept, scale=0.3)
        shape, out = read_npy(self.dir / "out.npy")
        self.assertEqual(shape, (1, 40, 4, 3))
        self.assertNear(out, want_out, 2e-6)
        shape, lse = read_npy(self.dir / "out.lse.npy")
        self.assertEqual(shape, (1, 4, 40))
        self.assertNear(lse, want_lse, 2e-6)

    def test_attend_nothing(self):
        """No queries, no keys (every row sees nothing: 0 and -inf), one token."""
        path, output = self.dir / "x.safetensors", self.dir / "out.safetensors"
        for lengths in ((0, 40), (20, 0), (1, 1), (0, 0)):
            sample = Sample(seqlen_q=lengths[0], seqlen_k=lengths[1])
            write_safetensors(path, sample.tensors)
            with self.subTest(lengths=lengths):
                self.ok("attend", "--input", path, "--pattern", "dense", "--check", "--output", output)
                got = read_safetensors(output)
                self.assertEqual(got["out"][1], [1, 2, lengths[0], 3])
                if lengths[1] == 0:
                    self.assertEqual(set(got["out"][2]), {0.0} if lengths[0] else set())
                    self.assertEqual(set(got["lse"][2]), {-math.inf} if lengths[0] else set())

    def test_attend_dtypes(self):
        sample = Sample()
        path, output = self.dir / "x.safetensors", self.dir / "out.safetensors"
        write_safetensors(path, sample.tensors)
        kept = self.pattern_json(sample, "--pattern", "dense", "--block", "16")[1]
        want = sample.attention(kept)[0]
        for dtype, name, tolerance in (
            ("bf16", "BF16", 0.05),
            ("fp16", "F16", 5e-3),
            ("fp32", "F32", 2e-6),
            ("fp64", "F64", 1e-6),
        ):
            self.ok(
                "attend",
                "--input",
                path,
                "--pattern",
                "dense",
                "--block",
                "16",
                "--dtype",
                dtype,
                "--check",
                "--output",
                output,
            )
            got = read_safetensors(output)
            self.assertEqual(got["out"][0], name)
            self.assertNear(got["out"][2], want, tolerance)
            # A 16-bit file is computed in its own dtype.
            if dtype != "fp64":
                record = json.loads(
                    self.ok("attend", "--input", path, "--pattern", "dense", "--dtype", dtype, "--format", "json")
                )
                self.assertEqual(record["dtype"], dtype)

    def test_hostile_files(self):
        good = self.dir / "good.safetensors"
        write_safetensors(good, Sample().tensors)
        raw = good.read_bytes()
        text = json.dumps({"q": {"dtype": "F32", "shape": [1 << 62, 1 << 62, 4, 4], "data_offsets": [0, 4]}}).encode()
        tensors = Sample().tensors
        shape, values = tensors["q"]
        cases = {
            "missing": None,
            "empty": b"",
            "short": raw[:7],
            "cut": raw[:-1],
            "left over": raw + b"x",
            "huge header": struct.pack("<Q", 1 << 60) + raw[8:],
            "no json": struct.pack("<Q", 4) + b"nope" + raw,
            "overflow": struct.pack("<Q", len(text)) + text + b"\0" * 4,
        }
        for name, content in cases.items():
            path = self.dir / "bad.safetensors"
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            with self.subTest(file=name):
                self.refused(1, "attend", "--input", path, "--pattern", "dense", says="bad.safetensors")
        for name, change in {
            "rank": ((4, 40, 2, 1, 1), values),
            "no batch": (shape[1:], values),
            "head dim": ((1, 2, 20, 8), values),
            "no v": None,
        }.items():
            bad = dict(tensors)
            if change is None:
                del bad["v"]
            else:
                bad["q"] = (change[0], (values * 2)[: math.prod(change[0])])
            write_safetensors(self.dir / "bad.safetensors", bad)
            with self.subTest(tensors=name):
                self.refused(1, "attend", "--input", self.dir / "bad.safetensors", "--pattern", "dense")
        for text in (
            "",
            "[]",
            "{",
            '{"seqlen_q": 40}',
            '{"seqlen_q": 40, "seqlen_k": 40, "block_q": 16, "block_k": 16,'
            ' "heads": [{"indptr": [0, 1, 2, 3], "indices": [0, 1, 7]}]}',
        ):
            (self.dir / "p.json").write_text(text)
            with self.subTest(pattern=text):
                self.refused(1, "attend", "--input", good, "--pattern-file", self.dir / "p.json")
        # A pattern of other lengths.
        self.ok("pattern", "--seq", "64", "--pattern", "dense", "--output", self.dir / "p.json")
        self.refused(1, "attend", "--input", good, "--pattern-file", self.dir / "p.json", says="pattern")

    def test_output_that_cannot_be_written(self):
        sample = self.dir / "x.safetensors"
        write_safetensors(sample, Sample().tensors)
        # A folder below a file cannot exist, not even for root.
        self.refused(1, "attend", "--input", sample, "--pattern", "dense", "--output", sample / "out.safetensors")
        self.refused(1, "pattern", "--seq", "64", "--pattern", "dense", "--png", sample / "p.png")
        self.refused(1, "analyze", "--input", sample, "--png", sample / "pictures")
        self.refused(1, "demo", "--quick", "--out", sample / "demo")
        self.assertEqual([p.name for p in self.dir.iterdir()], ["x.safetensors"])
        if os.geteuid() != 0:
            closed = self.dir / "closed"
            closed.mkdir(mode=0o500)
            self.refused(1, "demo", "--quick", "--out", closed)
            self.refused(1, "demo", "--quick", "--out", closed / "new")

    # ---- pattern ----

    def test_pattern_ascii_and_picture(self):
        text = self.ok(
            "pattern",
            "--seq",
            "64",
            "--pattern",
            "local_window",
            "--window",
            "16",
            "--block",
            "16",
            "--causal",
            "--ascii",
            "--png",
            self.dir / "p.png",
        )
        self.assertIn("#...\n##..\n.##.\n..##\n", text)
        self.assertEqual((self.dir / "p.png").read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
        self.ok(
            "pattern",
            "--seq",
            "64",
            "--pattern",
            "random,strided",
            "--density",
            "0.3,0.6",
            "--png",
            self.dir / "sheet.png",
        )
        self.assertEqual((self.dir / "sheet.png").read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_pattern_sweep(self):
        records = json.loads(
            self.ok(
                "pattern",
                "--seq",
                "1024",
                "--pattern",
                "dense,local_window,random",
                "--density",
                "0.25,0.5",
                "--block",
                "16,32",
                "--format",
                "json",
            )
        )
        self.assertEqual(
            [(r["pattern"], r.get("requested_density"), r["block_q"]) for r in records],
            [("dense", None, 16), ("dense", None, 32)]
            + [(p, d, b) for p in ("local_window", "random") for d in (0.25, 0.5) for b in (16, 32)],
        )
        for r in records:
            self.assertAlmostEqual(r["density"], r.get("requested_density", 1))
            self.assertAlmostEqual(r["density"] + r["sparsity"], 1)

    def test_pattern_seed(self):
        args = ["pattern", "--seq", "512", "--pattern", "random", "--density", "0.2", "--block", "16", "--output"]
        files = [self.dir / f"{i}.json" for i in range(3)]
        for file, seed in zip(files, (1, 1, 2)):
            self.ok(*args, file, "--seed", seed)
        a, b, c = (file.read_text() for file in files)
        self.assertEqual(a, b)
        self.assertNotEqual(a, c)

    # ---- analyze ----

    def test_analyze(self):
        path = self.dir / "x.safetensors"
        write_safetensors(path, Sample().tensors)
        dense, half = json.loads(
            self.ok(
                "analyze",
                "--input",
                path,
                "--pattern",
                "dense,local_window",
                "--density",
                "0.5",
                "--block",
                "16",
                "--format",
                "json",
            )
        )
        self.assertAlmostEqual(dense["coverage"], 1, places=5)
        self.assertAlmostEqual(dense["output_error"], 0, places=5)
        self.assertLess(half["coverage"], 1)
        self.assertGreater(half["output_error"], 0.01)
        self.assertGreaterEqual(half["oracle_coverage"] + 1e-6, half["coverage"])
        self.assertEqual(len(half["heads"]), 2)
        rows = list(
            csv.DictReader(
                io.StringIO(
                    self.ok(
                        "analyze", "--input", path, "--density", "0.5", "--block", "16", "--per-head", "--format", "csv"
                    )
                )
            )
        )
        self.assertEqual([r["head"] for r in rows], ["all", "0", "1"])
        self.ok("analyze", "--input", path, "--density", "0.3,0.6,0.9", "--block", "16", "--png", self.dir / "pictures")
        self.assertEqual(
            sorted(p.name for p in (self.dir / "pictures").iterdir()),
            ["local_window-0.3-b16.png", "local_window-0.6-b16.png", "local_window-0.9-b16.png", "quality.png"],
        )

    def test_analyze_coverage_is_the_attention_mass(self):
        """Coverage of a pattern is the mean share of exp(lse), which attend writes for both."""
        path, output = self.dir / "x.safetensors", self.dir / "out.safetensors"
        write_safetensors(path, Sample().tensors)
        lse = []
        for pattern in (["--pattern", "random", "--density", "0.4"], ["--pattern", "dense"]):
            self.ok("attend", "--input", path, *pattern, "--block", "16", "--output", output)
            lse.append(read_safetensors(output)["lse"][2])
        share = [math.exp(a - b) for a, b in zip(*lse)]
        record = json.loads(
            self.ok(
                "analyze",
                "--input",
                path,
                "--pattern",
                "random",
                "--density",
                "0.4",
                "--block",
                "16",
                "--format",
                "json",
            )
        )[0]
        self.assertAlmostEqual(record["coverage"], sum(share) / len(share), places=5)
        self.assertAlmostEqual(record["coverage_min"], min(share), places=5)

    def test_analyze_search(self):
        path = self.dir / "x.safetensors"
        write_safetensors(path, Sample().tensors)
        found = json.loads(
            self.ok("analyze", "--input", path, "--block", "16", "--target-coverage", "0.6", "--format", "json")
        )
        best = [c for c in found if c["best"]]
        self.assertTrue(best)
        self.assertGreaterEqual(best[0]["coverage"], 0.6)
        self.assertEqual(best[0]["density"], min(c["density"] for c in found if c["reached"]))

    # ---- bench ----

    def test_bench_record(self):
        (record,) = json.loads(self.ok(*TINY_BENCH, "--pattern", "dense", "--vs-dense", "--format", "json"))
        for key in BENCH_KEYS + ["dense_seconds", "speedup_vs_dense"]:
            self.assertIn(key, record)
        self.assertEqual((record["pass"], record["dtype"], record["seq"], record["block"]), ("fwd", "fp32", 64, 16))
        self.assertEqual(record["density"], 1)
        self.assertAlmostEqual(record["gflops"], 4 * 8 * 64 * 64 / record["seconds"] / 1e9)
        self.assertAlmostEqual(record["fraction_of_peak"], record["gflops"] / record["peak_gflops"])
        self.assertAlmostEqual(record["speedup_vs_dense"], record["dense_seconds"] / record["seconds"])
        self.assertLessEqual(record["min_seconds"], record["seconds"])
        self.assertLessEqual(record["seconds"], record["max_seconds"])
        self.assertGreater(record["peak_rss_bytes"], 1 << 20)

    def test_bench_counts_admitted_pairs_only(self):
        (record,) = json.loads(self.ok(*TINY_BENCH, "--pattern", "causal", "--format", "json"))
        self.assertTrue(record["causal"])
        self.assertAlmostEqual(record["gflops"], 4 * 8 * (64 * 65 // 2) / record["seconds"] / 1e9)
        (record,) = json.loads(
            self.ok(*TINY_BENCH, "--pattern", "dense", "--causal", "--window", "9", "--format", "json")
        )
        pairs = sum(min(i + 1, 10) for i in range(64))
        self.assertAlmostEqual(record["gflops"], 4 * 8 * pairs / record["seconds"] / 1e9)

    def test_bench_sweep(self):
        tiny = ["bench", "--heads", "2", "--head-dim", "8", "--repeat", "1", "--block", "16", "--format", "json"]
        records = json.loads(self.ok(*tiny, "--seq", "64", "--dtype", "fp32,bf16", "--threads", "1,2"))
        self.assertEqual(
            [(r["threads"], r["dtype"]) for r in records], [(t, d) for t in (1, 2) for d in ("fp32", "bf16")]
        )
        records = json.loads(self.ok(*tiny, "--seq", "64,96", "--pattern", "dense,random", "--density", "0.3,0.5"))
        self.assertEqual(
            [(r["seq"], r["pattern"], r.get("requested_density")) for r in records],
            [(s, p, d) for s in (64, 96) for p, d in (("dense", None), ("random", 0.3), ("random", 0.5))],
        )

    def test_bench_training(self):
        # 6 D + 4 Dv a pair backward: five products, three of them over D.
        args = [
            "bench",
            "--seq",
            "64",
            "--heads",
            "4",
            "--kv-heads",
            "2",
            "--head-dim",
            "8",
            "--head-dim-v",
            "24",
            "--block",
            "16",
            "--pattern",
            "causal",
            "--vs-dense",
            "--repeat",
            "1",
            "--format",
            "json",
        ]
        pairs = 4 * (64 * 65 // 2)
        for dtype in ("fp32", "bf16", "fp16", "fp64"):
            for one_pass, flops in (("bwd", 6 * 8 + 4 * 24), ("fwdbwd", 6 * 8 + 4 * 24 + 2 * 8 + 2 * 24)):
                (record,) = json.loads(self.ok(*args, "--pass", one_pass, "--dtype", dtype))
                for key in BENCH_KEYS if dtype != "fp64" else ["scratch_bytes", "peak_rss_bytes"]:
                    self.assertIn(key, record)
                self.assertEqual((record["pass"], record["dtype"], record["kv_heads"]), (one_pass, dtype, 2))
                self.assertAlmostEqual(record["gflops"], flops * pairs / record["seconds"] / 1e9)
                self.assertAlmostEqual(record["speedup_vs_dense"], record["dense_seconds"] / record["seconds"])
                self.assertGreater(record["seconds"], 0)
                self.assertGreater(record["scratch_bytes"] + (dtype == "fp64"), 0)

    def test_bench_runs_both_passes(self):
        # Seven products on the same pairs instead of two: 3.5 times the time. Were one pass left out, at most 2.5.
        args = ["bench", "--seq", "512", "--heads", "4", "--pattern", "dense", "--threads", "1", "--format", "json"]
        seconds = {p: json.loads(self.ok(*args, "--pass", p))[0]["min_seconds"] for p in ("fwd", "fwdbwd")}
        self.assertGreater(seconds["fwdbwd"], 1.5 * seconds["fwd"])

    def test_bench_dilated(self):
        # Segments of 64 are all 128 tokens in halves; of 200, clipped, every second token by the parity of the head.
        args = [
            "bench",
            "--seq",
            "128",
            "--heads",
            "2",
            "--head-dim",
            "8",
            "--block",
            "16",
            "--repeat",
            "1",
            "--segment-lengths",
            "64,200",
            "--dilation-rates",
            "1,2",
            "--format",
            "json",
        ]
        pairs = 2 * (2 * 64 * 64 + 64 * 64)
        for one_pass, flops in (("fwd", 4 * 8), ("bwd", 10 * 8), ("fwdbwd", 14 * 8)):
            (record,) = json.loads(self.ok(*args, "--pass", one_pass, "--vs-dense"))
            for key in BENCH_KEYS + ["dense_seconds", "speedup_vs_dense"]:
                self.assertIn(key, record)
            self.assertEqual(
                (record["pattern"], record["segment_lengths"], record["dilation_rates"]), ("dense", "64,200", "1,2")
            )
            self.assertAlmostEqual(record["density"], pairs / (2 * 128 * 128))
            self.assertAlmostEqual(record["gflops"], flops * pairs / record["seconds"] / 1e9)
        (sparse,) = json.loads(self.ok(*args, "--pattern", "dilated_sparse", "--density", "0.25", "--causal"))
        self.assertEqual((sparse["pattern"], sparse["segment_lengths"]), ("dilated_sparse", "64,200"))
        self.assertLess(sparse["density"], record["density"])

    def test_bench_decode(self):
        (record,) = json.loads(
            self.ok(
                "bench",
                "--pass",
                "decode",
                "--seq",
                "100",
                "--heads",
                "4",
                "--kv-heads",
                "2",
                "--head-dim",
                "8",
                "--block",
                "16",
                "--pattern",
                "dense",
                "--repeat",
                "1",
                "--format",
                "json",
            )
        )
        self.assertEqual((record["pass"], record["queries"], record["seq"]), ("decode", 1, 100))
        self.assertAlmostEqual(record["gbytes_per_second"], 2 * 100 * (8 + 8) * 4 / record["seconds"] / 1e9)
        self.assertGreater(record["read_gbytes_per_second"], 0)

    def test_isa_is_the_one_asked_for(self):
        for isa in json.loads(self.ok("info", "--no-peaks", "--format", "json"))["isas_usable"]:
            (record,) = json.loads(self.ok(*TINY_BENCH, "--pattern", "dense", "--isa", isa, "--format", "json"))
            self.assertEqual(record["isa"], isa)
            report = json.loads(self.ok("check", "--cases", "3", "--isa", isa, "--format", "json"))
            self.assertTrue(report["passed"])
            self.assertEqual({r["isa"] for r in report["rows"]}, {isa})

    # ---- check, info, demo ----

    def test_check(self):
        report = json.loads(self.ok("check", "--cases", "20", "--seed", "3", "--format", "json"))
        self.assertTrue(report["passed"])
        self.assertEqual((report["cases"], report["seed"], report["failures"]), (20, 3, []))
        for name in ("fwd", "bwd"):
            self.assertGreater(sum(r["cases"] for r in report["rows"] if r["pass"] == name), 0)
            self.assertIn("dilated", {r["path"] for r in report["rows"] if r["pass"] == name})
            alone = json.loads(self.ok("check", "--cases", "3", "--pass", name, "--format", "json"))
            self.assertEqual({r["pass"] for r in alone["rows"]}, {name})
        self.assertIn("passed: 20 cases, seed 3", self.ok("check", "--cases", "20", "--seed", "3"))

    def test_info(self):
        info = json.loads(self.ok("info", "--format", "json"))
        self.assertRegex(info["version"], r"^\d+\.\d+\.\d+$")
        self.assertTrue(set(info["isas_usable"]) <= set(info["isas_compiled"]))
        self.assertTrue(info["features"]["cpu_backward"])
        self.assertFalse(info["features"]["cuda"])
        threads = {p["threads"] for p in info["peaks"]}
        self.assertIn(1, threads)
        self.assertTrue(all(p["fma_gflops"] > 0 for p in info["peaks"]))
        self.assertTrue(any(p["read_gbytes_per_second"] for p in info["peaks"]))

    def test_demo(self):
        sample, out = self.dir / "x.safetensors", self.dir / "new" / "demo"
        write_safetensors(sample, Sample(heads=2, kv_heads=2, seqlen_q=300, seqlen_k=300, dim=8, dim_v=8).tensors)
        args = ["demo", "--quick", "--input", sample, "--longest", "0", "--out", out]
        text = self.ok(*args)
        self.assertLessEqual(max(map(len, text.replace(str(self.dir), "").splitlines())), 100)
        results = json.loads((out / "results.json").read_text())
        for section in ("errors", "quality", "times", "training"):
            names = [r["pattern"] for r in results[section]]
            for name in ("preset local", "preset dilated", "preset global_local", "preset ultra_sparse"):
                self.assertIn(name, names)
        self.assertAlmostEqual(results["quality"][0]["coverage"], 1, places=5)  # dense
        self.assertTrue(all(r["passed"] for r in results["errors"]))
        # Dilated attention of the whole sample by tokens 0, 1 of every 1, 4, 16: all (w, r) are longer than it. Inside,
        # blocks of 128 by the budget of 1 %, one a row: the diagonal. Pairs count once for each (w, r).
        (ultra,) = [r for r in results["quality"] if r["pattern"] == "preset ultra_sparse"]
        pairs = sum(
            j <= i and i // 128 == j // 128
            for h in (0, 1)
            for r in (1, 4, 16)
            for i in range(len(range(h % r, 300, r)))
            for j in range(i + 1)
        )
        self.assertAlmostEqual(ultra["density"], pairs / (2 * 300 * 301 / 2))
        self.assertNotIn("oracle_coverage", ultra)
        for picture in ("patterns.png", "quality.png"):
            self.assertEqual((out / picture).read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
            self.assertIn(str(out / picture), text)
        rows = list(csv.reader(io.StringIO(self.ok(*args, "--format", "csv"))))
        self.assertEqual({len(row) for row in rows}, {len(rows[0])})
        self.assertEqual({row[0] for row in rows[1:]}, {"errors", "quality", "times", "training", "pictures"})

    # ---- terminals and pipes ----

    def test_closed_pipe_is_quiet(self):
        for args in (
            ["pattern", "--seq", "64", "--pattern", "dense"],
            ["--help"],
            ["--version"],
            ["check", "--cases", "1", "--format", "json"],
        ):
            read, write = os.pipe()
            os.close(read)
            process = subprocess.run([PROGRAM, *args], stdout=write, stderr=subprocess.PIPE, timeout=300)
            os.close(write)
            self.assertEqual(process.stderr, b"")
            self.assertEqual(process.returncode, 1)

    def test_full_disk_is_an_error(self):
        with open("/dev/full", "w") as full:
            process = subprocess.run([PROGRAM, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
        self.assertEqual(process.returncode, 1)
        self.assertIn("tessera: standard output", process.stderr)

    def test_counts_of_tokens(self):
        for text, n in (("64k", 65536), ("1K", 1024), ("2M", 2097152), ("77", 77)):
            args = ["pattern", "--pattern", "dense", "--seq", text, "--block", "256", "--format", "json"]
            self.assertEqual(json.loads(self.ok(*args))[0]["seqlen_q"], n)
        out = self.ok("pattern", "--pattern", "local_window", "--window", "1k", "--seq", "4k", "--format", "json")
        same = self.ok("pattern", "--pattern", "local_window", "--window", "1024", "--seq", "4096", "--format", "json")
        self.assertEqual(json.loads(out)[0]["kept_blocks"], json.loads(same)[0]["kept_blocks"])
        for text in ("k", "1G", "1kk", "1.5k", "-1k", "99999999999999999M"):
            self.refused(2, "pattern", "--pattern", "dense", "--seq", text)

    def test_seeds_to_the_end(self):
        self.ok("pattern", "--pattern", "random", "--seq", "64", "--seed", 2**64 - 1)
        self.ok("check", "--cases", "1", "--seed", 2**64 - 1)
        self.ok(*TINY_BENCH, "--pattern", "dense", "--input-seed", 2**64 - 1)
        for seed in (2**64, -1, "x"):
            self.refused(2, "pattern", "--pattern", "random", "--seq", "64", "--seed", seed)

    def test_what_a_pattern_file_says_is_said_once(self):
        with tempfile.TemporaryDirectory() as folder:
            path, x = pathlib.Path(folder, "p.json"), pathlib.Path(folder, "x.safetensors")
            self.ok("pattern", "--pattern", "dense", "--seq", "64", "--block", "16", "--output", path)
            numbers = [0.1] * (64 * 8)
            write_safetensors(x, dict.fromkeys("qkv", ((1, 1, 64, 8), numbers)))
            beside = ["pattern", "density", "budget", "block", "block-k", "dilation-rates", "global-tokens", "stride"]
            beside += ["seed", "pattern-heads", "ranks", "ranks-per-node", "local-density", "global-density"]
            beside += ["inter-node-density", "segment-lengths"]
            values = {"pattern": "dense", "budget": "even", "density": "0.5", "block": "16", "block-k": "16"}
            for name in beside:
                value = values.get(name, "0.5" if "density" in name else "1")
                for command in (["pattern"], TINY_BENCH[:1], ["attend", "--input", x], ["analyze", "--input", x]):
                    says = f"--{name}: got it beside --pattern-file"
                    self.refused(2, *command, "--pattern-file", path, f"--{name}", value, says=says)
            for name in ("seq", "seq-k", "heads"):
                self.refused(2, "pattern", "--pattern-file", path, f"--{name}", "1")
            self.refused(2, "pattern", "--pattern-file", path, "--window", "9")  # of named patterns; attention has one
            self.ok("attend", "--input", x, "--pattern-file", path, "--window", "9", "--causal", "--check")

    def test_bench_of_a_pattern_file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "p.json")
            common = ["--heads", "1", "--head-dim", "8", "--repeat", "1", "--format", "json", "--pattern-file", path]
            self.ok("pattern", "--pattern", "local_window", "--density", "0.5", "--seq", "80", "--block", "16",
                    "--causal", "--output", path)  # fmt: skip
            for passes in ("fwd", "bwd", "fwdbwd"):
                row = json.loads(self.ok("bench", "--pass", passes, *common))[0]
                self.assertEqual((row["seq"], row["block"], row["causal"]), (80, 16, True))
                self.assertEqual(row["pattern"], str(path))
                self.assertGreater(row["gflops"], 0)
            self.refused(2, "bench", "--seq", "96", *common)
            self.refused(2, "bench", "--pass", "decode", *common)  # 80 queries
            self.ok("pattern", "--pattern", "dense", "--seq", "1", "--seq-k", "80", "--block", "16", "--output", path)
            self.assertEqual(json.loads(self.ok("bench", "--pass", "decode", *common))[0]["seq"], 80)
            self.refused(2, "bench", *common)

    def test_names_of_outputs(self):
        with tempfile.TemporaryDirectory() as folder:
            for args in (
                ["pattern", "--pattern", "dense", "--seq", "64", "--png", f"{folder}/x.jpg"],
                ["pattern", "--pattern", "dense", "--seq", "64", "--png", f"{folder}/.png".replace("/.png", "/x")],
                ["pattern", "--pattern", "dense", "--seq", "64", "--output", f"{folder}/x.png"],
                ["demo", "--out", f"{folder}/x.png"],
                ["analyze", "--input", "none", "--png", f"{folder}/x.jpg"],
            ):
                self.refused(2, *args)
            self.assertEqual(os.listdir(folder), [])

    def test_written_files_are_listed(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            numbers = [0.1 * (i % 7) for i in range(40 * 8)]
            write_safetensors(path / "x.safetensors", dict.fromkeys("qkv", ((1, 1, 40, 8), numbers)))
            common = ["--input", path / "x.safetensors", "--pattern", "local_window", "--block", "16"]
            listed = self.ok("attend", *common, "--output", path / "o.npy").split("Written\n")[1]
            self.assertEqual(listed.split(), [f"{path}/o.npy", "out", f"{path}/o.lse.npy", "lse"])
            listed = self.ok("analyze", *common, "--density", "0.5,1", "--png", path / "pictures").split("Written\n")[1]
            files = [line.split()[0] for line in listed.splitlines()]
            self.assertEqual(len(files), 3)
            self.assertEqual(sorted(files), sorted(str(f) for f in (path / "pictures").iterdir()))
            drawn = ["--png", path / "p.png", "--output", path / "p.json"]
            listed = self.ok("pattern", "--pattern", "dense", "--seq", "64", *drawn).split("Written\n")[1]
            self.assertEqual(
                [line.split()[0] for line in listed.splitlines()], [str(path / "p.json"), str(path / "p.png")]
            )

    def test_both_files_of_attend_or_none(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            write_safetensors(path / "x.safetensors", dict.fromkeys("qkv", ((1, 1, 40, 8), [0.1] * 320)))
            (path / "o.npy").write_bytes(b"old")
            (path / "o.lse.npy").mkdir()
            args = ["--input", path / "x.safetensors", "--pattern", "dense", "--block", "16"]
            self.refused(1, "attend", *args, "--output", path / "o.npy")
            self.assertEqual((path / "o.npy").read_bytes(), b"old")

    def test_a_layout_that_makes_no_sense_is_a_warning(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "x.safetensors")
            write_safetensors(path, dict.fromkeys("qkv", ((1, 256, 4, 8), [0.1] * (256 * 32))))
            args = ["attend", "--input", path, "--pattern", "dense", "--block", "16"]
            result = run(*args)
            self.assertEqual(result.returncode, 0)
            self.assertRegex(result.stderr, r"warning: .*256 heads of 4 tokens.*--layout bshd")
            self.assertEqual(run(*args, "--layout", "bshd").stderr, "")

    def test_an_interrupted_demo_leaves_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder, "demo")
            source = pathlib.Path(__file__).parents[1] / "data/byte_lm_qkv.safetensors"
            for number in (signal.SIGINT, signal.SIGTERM):
                process = subprocess.Popen(
                    [PROGRAM, "demo", "--quick", "--input", source, "--out", out],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
                time.sleep(0.5)
                process.send_signal(number)
                self.assertEqual(process.communicate(timeout=60)[1], b"")
                self.assertEqual(process.returncode, -number)
                self.assertEqual(os.listdir(folder), [])

    def test_completions_and_manual(self):
        for shell in ("bash", "zsh"):
            script = self.ok("completions", shell)
            for word in (*COMMANDS, "--pattern-file", "bigbird", "bhsd", "--out"):
                self.assertIn(word, script)
            if shutil.which(shell):
                subprocess.run([shell, "-n"], input=script, text=True, check=True)
        complete = """
            source /dev/stdin
            ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tessera; echo "${COMPREPLY[@]}"; }
            ask tessera b; ask tessera bench --pas; ask tessera bench --pass b; ask tessera help an
            ask tessera attend --pattern glo"""
        script = self.ok("completions", "bash")
        done = subprocess.run(["bash", "-c", complete], input=script, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.splitlines(), ["bench", "--pass", "bwd", "analyze", "global_local"])
        page = self.ok("man")
        for word in (*COMMANDS, r"\-\-segment\-lengths", "1,048,576"):
            self.assertIn(word, page)
        self.refused(2, "completions", "fish")
        self.refused(2, "completions")

    def terminal(self, **environment):
        """What a terminal shows of a check."""
        master, slave = pty.openpty()
        process = subprocess.Popen([PROGRAM, "check", "--cases", "40"], stdout=subprocess.PIPE, stderr=slave,
                                   env=os.environ | environment)  # fmt: skip
        os.close(slave)
        seen = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # Linux: the other side is closed
                break
            if not chunk:
                break
            seen += chunk
        process.communicate(timeout=300)
        os.close(master)
        self.assertEqual(process.returncode, 0)
        return seen

    def test_plain_lines_where_escapes_are_not_wanted(self):
        for environment in ({"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}):
            seen = self.terminal(**environment)
            self.assertNotIn(b"\x1b", seen)
            self.assertNotIn(b"\r", seen.replace(b"\r\n", b"\n"))
            self.assertRegex(seen, rb"tessera: case \d+ of 40\r?\n")

    def test_progress_on_a_terminal_only(self):
        seen = self.terminal(TERM="xterm", NO_COLOR="")
        self.assertIn(b"case ", seen)
        self.assertTrue(seen.endswith(b"\r\x1b[K"), "the bar is wiped")


if __name__ == "__main__":
    unittest.main()
