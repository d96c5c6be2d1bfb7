"""The changes that `tools.mutate` makes: each is a fault, and its tests must fail under it.

`old` stands in the file exactly once. An entry whose `old` is gone is stale: say the same of the
code that took its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mutant(NamedTuple):
    """A change of one file of graphquant, what it breaks, and pytest's arguments for its tests."""

    file: str
    old: str
    new: str
    breaks: str
    tests: str


SURVIVORS = "tests/passes/test_survivors.py"
APPLY, NORMALIZE = (f"tests/passes/test_{n}.py" for n in ("apply", "normalize"))
EMPTY_MASKS = "tests/passes/attention/test_empty_masks.py"
POLICY = "tests/passes/policy/test_"
RANGES, ACCURACY, SMOOTH = (f"{POLICY}{name}.py" for name in ("ranges", "accuracy", "smoothquant"))
CONSTANTS = "tests/ir/test_constants.py tests/ir/test_written_state.py"
RULES = "tests/passes/rules/test_"
STACK, ACT, NORM = f"{RULES}stack_siblings.py", f"{RULES}act_linear.py", f"{RULES}norm_linear.py"
RESIDUAL, SCALE, LINEAR = (f"{RULES}{name}.py" for name in ("residual", "layer_scale", "linear"))
QUANTIZE = "tests/ops/test_quantize.py -k reference"
ROWS = "tests/ops/test_num_rows.py -k 'leading or behind'"
PACKED, PRODUCTS = "tests/weights/test_packed.py", "tests/passes/test_products.py -k addmm"
FILES, HISTOGRAM = "tests/calibration/test_files.py", "tests/calibration/test_histogram.py"
CALIBRATE, BUDGET = "tests/calibration/test_calibrate.py", "tests/accuracy/test_budget.py"
CACHE, TIMING = "tests/ops/runtime/test_cache.py", "tests/ops/test_timing.py"
INDEX = "tests/ops/test_token_index.py"
VARLEN = "tests/ops/test_varlen_attention.py -k 'float64 and"
MASKS = "tests/passes/attention/test_masked.py"
GRADIENTS = "tests/test_gradients.py"
KEPT = "tests/passes/test_constant_values.py -k 'not follow and not encoders'"
NOTES = "tests/passes/test_notes.py -k 'known or old'"
ACCELERATE = "tests/test_accelerate.py -k 'hook_of or come_after or inside or offloaded'"
PROGRESS = "tests/test_progress.py"
WRITTEN_OUT = "tests/passes/attention/test_written_out.py"


def _in(file: str, *changes: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(file, *change) for change in changes]


MUTANTS: Sequence[Mutant] = (
    # --- rules and the engine ------------------------------------------------------------------
    *_in(
        "passes/rules/stack_siblings.py",
        ("(group[0].x, *nodes)", "nodes", "the input may be written in between", SURVIVORS),
        ("(group[0].x, *nodes)", "(group[0].x,)", "a sibling may be written", STACK),
        ("any(n.bias is not None for", "any(n.bias is None for", "biases are lost", STACK),
        ("dtype(linear.node), dtype(linear.weight)", "0", "types are mixed", STACK),
        ("start = stop", "start = 0", "all siblings get the first one's columns", STACK),
    ),
    *_in(
        "passes/rules/act_linear.py",
        ("(act.x,) if up is None", "() if up is None", "x may be written before", SURVIVORS),
        ("else (act.x, up)", "else (up,)", "the gate may be written before", SURVIVORS),
        ("else (act.x, up)", "else (act.x,)", "up may be written before", SURVIVORS),
        ("                and not views\n", "", "the gate's views are ignored", SURVIVORS),
        ("not leads_only_to(value, goal)", "False", "float and int8 both computed", ACT),
        ("(out.args, out.args[::-1])", "(out.args,)", "the gate may be the second factor", ACT),
    ),
    *_in(
        "passes/rules/norm_linear.py",
        ("read = (norm.x, out, ", "read = (out, ", "x may be written before", NORM),
        ("read = (norm.x, out, ", "read = (norm.x, ", "the result may be written", NORM),
        ("out), *parameters)", "out))", "gamma may be written before", NORM),
        ("keep = not leads_only_to(out, linear.node)", "keep = False", "residual lost", NORM),
        ("smoothing._replace(factor=None)", "smoothing", "the scale is applied twice", SMOOTH),
    ),
    *_in(
        "passes/rules/residual.py",
        ("if total in view.needs_gradient", "if False", "a gradient is lost", GRADIENTS),
        ("not same_sizes(shape(end), shape(total))", "False", "a broadcast linear", RESIDUAL),
        (
            "not same_sizes(shape(site.residual), shape(total))",
            "False",
            "a broadcast residual",
            RESIDUAL,
        ),
        ("or user.kwargs", "", "alpha is ignored", RESIDUAL),
        (".residual is not None", ".residual == 0", "a second residual replaces", SURVIVORS),
    ),
    *_in(
        "passes/rules/layer_scale.py",
        ('name in ("w_scale", "w_sum", "bias")', 'name in ("w_scale", "bias")', "the shift", SCALE),
        ("size[-1] == N and ", "", "a scale per token", SCALE),
        ("if product in view.needs_gradient", "if False", "a gradient is lost", GRADIENTS),
    ),
    *_in(
        "passes/state.py",
        ("found, x=self._current(found.x), gamma=", "found, x=found.x, gamma=",
         "the norm's input was replaced", SURVIVORS),
        (
            "found and replace(found, x=self._current(found.x))",
            "found",
            "the activation's input was replaced",
            f"{SURVIVORS} {ACT}",
        ),
    ),
    *_in(
        "passes/apply.py",
        ("if x in state.written), None)", "if False), None)", "nothing moved is safe", SURVIVORS),
        ("state.written.add(now)", "pass", "a replaced value is written", SURVIVORS),
        ("(want := _spec(old)) != (got := _spec(now))", "False", "shapes", APPLY),
        ("autocast_at(first):", "state.fake_mode:", "types under autocast", APPLY),
    ),
    *_in(
        "ir/rows.py",
        ("last not in (node.args[1] % len(before), node.args[2] % len(before))", "True",
         "a transposed row is no row", SURVIVORS),
        ("bool(node.args[1][-1] % len(before) == last)", "True", "nor a permuted one", SURVIVORS),
        ("user is goal or (", "(", "a reader at the goal counts as another", ACT),
    ),
    *_in(
        "ir/gradients.py",
        ("and node.target is not aten.detach.default", "", "detached values", GRADIENTS),
    ),
    *_in(
        "ir/contexts.py",
        ("autocast=(*now.autocast, node.args))", "autocast=now.autocast)", "autocast", APPLY),
    ),
    *_in(
        "passes/eligibility.py",
        ("if why := state.config.wants(path):", "if why := None:", "include and exclude", LINEAR),
        ("if node in state.needs_gradient:", "if False:", "training", GRADIENTS),
        ('state.constants:\n        return "its weight', 'set():\n        return "its weight',
         "every linear is ineligible", LINEAR),
    ),
    *_in(
        "ops/runtime/chips.py",
        ("gpu.int8 < gpu.bf16", "False", "slow int8", NOTES),
        ("None if sm >= OLDEST", "None if True", "a GPU that is too old", NOTES),
    ),
    *_in(
        "parts.py",
        ("if inside := [name for name in hooks if name]:", "if inside := []:", "hooks inside",
         ACCELERATE),
        ('getattr(hook, "offload", False)', "False", "offloaded weights", ACCELERATE),
    ),
    *_in(
        "optimized/calls.py",
        ("(UNHOOKED if is_hooked(module) else FORWARD", "(FORWARD", "a hook that still runs",
         ACCELERATE),
    ),
    *_in(
        "utils/progress.py",
        ("sys.stderr is not None and sys.stderr.isatty()", "True", "no terminal", PROGRESS),
        ("        line.leave()", "        pass", "the phase that ended", PROGRESS),
    ),
    *_in(
        "ir/constants.py",
        ("root not in self._written for root", "True for root", "written weights", CONSTANTS),
        ("and node not in self._written", "", "written values", CONSTANTS),
    ),
    *_in(
        "ir/graph.py",
        ("return not train or p == 0", "return True", "dropout", NORMALIZE),
    ),
    *_in(
        "passes/products.py",
        ("if beta not in (0, 1):", "if False:", "addmm's beta", PRODUCTS),
    ),
    *_in(
        "passes/attention/empty_masks.py",
        ("return bool(value.all()) if", "return True if", "masks", EMPTY_MASKS),
    ),
    *_in(
        "passes/policy/ranges.py",
        ("min(low for low, _", "max(low for low, _", "siblings' range", RANGES),
        ("max(end, -clip)", "end", "the clip's lower end", RANGES),
    ),
    *_in(
        "passes/policy/smoothquant.py",
        ("functools.reduce(torch.maximum, found)", "found[0]", "siblings' channels", SURVIVORS),
    ),
    *_in(
        "passes/policy/accuracy.py",
        ("if lowest >= min_sqnr", "if lowest >= 0", "min_sqnr", ACCURACY),
    ),
    # --- the arithmetic ------------------------------------------------------------------------
    *_in(
        "ops/numerics.py",
        ("x.amax(-1, keepdim=True).clamp(min=0.0)", "x.amax(-1, keepdim=True)",
         "0 in range", QUANTIZE),
        ("x.amin(-1, keepdim=True).clamp(max=0.0)", "x.amin(-1, keepdim=True)",
         "0 in range", QUANTIZE),
        ("absmax = (0.5 * most - 0.5 * least)", "absmax = (most - least) * 0.5",
         "overflow", QUANTIZE),
        ("MIN_ABSMAX = 1e-20", "MIN_ABSMAX = 1e-6", "small rows", SURVIVORS),
        ("torch.round(x * (qmax / absmax))", "torch.floor(x * (qmax / absmax) + 0.5)",
         "ties", QUANTIZE),
        ("x = x * factor", "x = x / factor", "smoothing", QUANTIZE),
        ("x.clamp(-clip, clip)", "x.clamp(max=clip)", "the clip's lower end", QUANTIZE),
        ("torch.fmax(x, least)", "torch.maximum(x, least)", "nan in a static range", QUANTIZE),
        ("most - shift, shift - least)", "most - shift, most - shift)", "rounded shifts", QUANTIZE),
        ("1.702 * x", "1.7 * x", "quick GELU", "tests/ops/test_quantize.py -k activation"),
    ),
    *_in(
        "ops/triton_rows.py",
        ("* ROWS >= tl.load(num_rows_ptr)", "< 0", "all rows are computed", ROWS),
        ("* ROWS >= tl.load(num_rows_ptr)", ">= tl.load(num_rows_ptr)", "half of them are", ROWS),
    ),
    *_in(
        "ops/cpu/call.h",
        ("some ? std::clamp<int64_t>(*some, 0, all) : all", "all", "all are computed", ROWS),
        ("std::clamp<int64_t>(*some, 0, all)", "*some", "more rows than there are", ROWS),
    ),
    *_in(
        "ops/numerics.py",
        ("isinstance(first, int) and first >= K", "False", "one row is another program",
         "tests/ops/test_rows_alone.py -k program"),
    ),
    *_in(
        "ops/int8_linear/op.py",
        ("EXACT_K = 1024", "EXACT_K = 4096", "sums are not exact", SURVIVORS),
        (".addcmul(x_shift, w_sum)", "", "the shift", "tests/ops/test_int8_linear.py -k 'float64'"),
        ("y = y + residual.float()", "y = y.to(dtype) + residual", "one rounding",
         "tests/ops/test_int8_linear.py -k 'float64 or rounded'"),
    ),
    # --- packed weights ------------------------------------------------------------------------
    *_in(
        "weights/packed.py",
        ("versions_of(roots(args)) != self.versions", "False", "new versions", PACKED),
        ("packed.versions != now or ", "", "weights that have changed", PACKED),
        (" or packed.epoch != epoch", "", "refresh()", PACKED),
        ("(recipe, *(t.id for t in trackers))", "(recipe, trackers[0].id)", "tied weights", PACKED),
    ),
    *_in(
        "weights/versions.py",
        ("p for group in optimizer.param_groups", "p for group in []", "fused optimizers", PACKED),
    ),
    *_in(
        "weights/snapshot.py",
        ("return self.version, self.address, self.storage.cdata",
         "return self.version, self.storage.cdata", "other data", f"{SURVIVORS} {PACKED}"),
        ("return self.version, self.address, self.storage.cdata",
         "return self.address, self.storage.cdata", "writes in place", PACKED),
    ),
    *_in(
        "passes/prepack.py",
        ("(t) in root_storages else", "(t) in () else",
         "packed weights in a parameter's memory", SURVIVORS),
    ),
    # --- capture -------------------------------------------------------------------------------
    *_in(
        "capture/aten.py",
        ("captured.differentiable.add(new)", "pass", "training", GRADIENTS),
        ("    GET_DATA: Tensor.detach,", "", ".data",
         "tests/test_backend.py -k data"),
    ),
    # --- calibration ---------------------------------------------------------------------------
    *_in(
        "calibration/histogram.py",
        ("counts[BINS // 4 : -BINS // 4] = pairs", "counts[: BINS // 2] = pairs",
         "ranges", HISTOGRAM),
        ("BINS.bit_length() - 2)", "BINS.bit_length() - 3)",
         "the last step", f"{FILES} -k quickly"),
        ("(u - n) ** 3 / 3", "(u - n) ** 2 / 3", "the expected error", HISTOGRAM),
        ("1 / ratio, ratio)", "1 / ratio)", "the search", HISTOGRAM),
    ),
    *_in(
        "calibration/record.py",
        ("torch.minimum(self.low, other.low)", "self.low", "ranges of parts", CALIBRATE),
        ("self.left_out + other.left_out", "self.left_out", "what is left out", FILES),
        ("x.where(finite, math.inf)", "x", "nan in ranges", CALIBRATE),
    ),
    *_in(
        "calibration/sample.py",
        ("hashes[1:] != hashes[:-1]", "hashes[1:] == hashes[1:]", "rows kept twice",
         "tests/calibration/test_sample.py"),
    ),
    *_in(
        "calibration/calibration.py",
        ("merged.batches += other.batches", "pass", "the count of merged data", FILES),
        ("!= sha256(", "== '' or sha256(", "damaged files", FILES),
    ),
    *_in(
        "calibration/saved.py",
        ("(counts >= 0).all()", "True", "negative counts", FILES),
        ("values == rows * K - left_out", "True", "counts of no data", FILES),
        ("integer(MIN_EXPONENT, MAX_EXPONENT)", "integer(-(10**9), 10**9)", "exponents", FILES),
        ("empty | finite", "empty | ~empty", "nan and inf in ranges", FILES),
        ("inside.all()", "True", "rows that were never seen", FILES),
    ),
    # --- packed sequences ----------------------------------------------------------------------
    *_in(
        "ops/token_index/op.py",
        ("so_far[-1] + at - so_far", "so_far[-1]", "pads behind the tokens", INDEX),
        ("flat[:1] | ~flat.any()", "flat[:1]", "a batch of pads alone", INDEX),
        ("descending=True", "descending=False", "the longest sequence first", INDEX),
    ),
    *_in(
        "ops/token_index/triton.py",
        ("other[None, :] < b", "other[None, :] <= b", "the first row of a sequence", INDEX),
        ("== own[:, None]) & before", "== own[:, None])", "tiles of equal lengths", INDEX),
    ),
    *_in(
        "ops/varlen_attention/op.py",
        ("seen & (p <= p[:, None])", "seen", "causal", f"{VARLEN} reference'"),
    ),
    *_in(
        "ops/varlen_attention/triton.py",
        ("seen = key[None, :]", "seen = key[None, :] | True", "the next one's keys",
         f"{VARLEN} triton'"),
    ),
    *_in(
        "ops/cpu/attention.cpp",
        ("if (!near) x = ", "if (false) x = ", "windows", f"{VARLEN} cpu'"),
        ("if (!first)", "if (false)", "several blocks of keys", f"{VARLEN} cpu'"),
    ),
    # --- masks of padded attention -------------------------------------------------------------
    *_in(
        "ops/attention/op.py",
        ("found.append(j <= i)", "found.append(j < i)", "a query's own key",
         "tests/ops/test_padded_attention.py -k 'float64 and reference'"),
    ),
    *_in(
        "passes/attention/written_out.py",
        ("a.score is None or read & excluded or", "a.score is None or", "a gradient", WRITTEN_OUT),
        ("or not _fits(a)", "", "keys that are broadcast over heads", WRITTEN_OUT),
        ("and logits.scale > 0", "", "a negative scale", WRITTEN_OUT),
        ("if more is before:", "if False:", "scores added to themselves", WRITTEN_OUT),
        ("or not value <= REPLACES_SCORES", "", "a number that replaces scores", WRITTEN_OUT),
        ("if if_true is before:", "if True:", "scores where a mask is false", WRITTEN_OUT),
        ("self.bias = self.call(aten.mul.Tensor, self.bias, factor)", "pass", "a scaled bias",
         WRITTEN_OUT),
        ("or dtype(more) != self.dtype", "", "a bias of another dtype", WRITTEN_OUT),
        ("for n in (B, H, S, D, T)):", "for n in ()):", "sizes that depend on data", WRITTEN_OUT),
        ("same and source not in excluded", "same", "queries that are written", WRITTEN_OUT),
        ("return same and finely and", "return same and", "probabilities cast to integers",
         WRITTEN_OUT),
        ("logits.scale *= of_q * of_k", "logits.times(of_q * of_k)", "a bias of scaled queries",
         WRITTEN_OUT),
        ("or reader is not a.score", "", "scaled queries that are read twice", WRITTEN_OUT),
    ),
    *_in(
        "passes/attention/mask_forms.py",
        ("every_query=True", "every_query=False", "queries at padding", MASKS),
        ("if not keys.exact or", "if", "a mask that sees a 2", MASKS),
    ),
    *_in(
        "passes/padding/masks.py",
        ("self._written & read_by(attention)", "set()", "a mask is written", MASKS),
    ),
    *_in(
        "passes/constant_values.py",
        ("value not in returned", "True", "the caller writes to what is kept", KEPT),
        ("n not in gradient", "True", "a gradient is lost", KEPT),
        ("return torch.is_autocast_enabled(device)", "return False", "autocast around", KEPT),
        ("return bool(enabled)", "return False", "autocast inside", KEPT),
        ("found.get(reader, True)", "True", "of a large value nothing is kept", KEPT),
        ("<= min(room, LARGEST)", "<= LARGEST", "as much memory as there are values", KEPT),
    ),
    # --- files and caches ----------------------------------------------------------------------
    *_in(
        "utils/serialization.py",
        ("os.replace(name, target)", "target.write_bytes(data)", "permissions and links", BUDGET),
        ("if len(result) != len(pairs):", "if False:", "a key twice", BUDGET),
    ),
    *_in(
        "config.py",
        ("if not _is_data(name, value):", "if False:", "a file that names a program", BUDGET),
    ),
    *_in(
        "ops/runtime/cache.py",
        ("about.st_uid != os.geteuid()", "False", "another user's files", CACHE),
        ("stat.S_IWGRP | stat.S_IWOTH", "stat.S_IWOTH", "a group's files", CACHE),
        ("checked and _read(", "False and _read(", "tampered files", CACHE),
        ("os.O_DIRECTORY | os.O_NOFOLLOW", "os.O_DIRECTORY", "a linked directory", CACHE),
    ),
    *_in(
        "ops/timing.py",
        ("or len(answer) != len(found)", "", "times that are none", TIMING),
        ("asked != (question, machine(device)) or", "", "another question's times", TIMING),
        ('".py", ".cu", ".cuh", ".c", ', '".py", ".cuh", ".c", ', "another kernel's times", TIMING),
    ),
)  # fmt: skip
