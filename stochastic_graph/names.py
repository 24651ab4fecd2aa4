"""The names of torch functions by how they treat dimensions; tests/stochastic_graph proves them, item by item."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# About a tensor rather than of its numbers.
PLAIN = _words(
    "equal allclose is_nonzero numel nelement size dim ndimension stride item tolist numpy as_subclass backward "
    "_is_all_true _is_any_true register_hook retain_grad __set__ grad new new_tensor new_zeros new_ones new_full "
    "new_empty"
)

_UNARY = """
abs absolute acos acosh angle arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh bernoulli bfloat16
bitwise_not bool byte ceil celu clone conj conj_physical contiguous cos cosh deg2rad detach digamma double elu
empty_like erf erfc erfinv exp exp2 expm1 fix float floor frac frexp full_like gelu half hardshrink hardsigmoid
hardswish hardtanh i0 imag int isfinite isinf isnan isneginf isposinf isreal leaky_relu lgamma log log10 log1p log2
log_sigmoid logit logical_not logsigmoid long mish mvlgamma nan_to_num neg negative ones_like poisson polygamma
positive rad2deg rand_like randint_like randn_like real reciprocal relu relu6 resolve_conj resolve_neg round rrelu
rsqrt selu sgn short sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign special_bessel_j0
special_bessel_j1 special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv special_exp2
special_expit special_expm1 special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p
special_log_ndtr special_logit special_multigammaln special_ndtr special_ndtri special_polygamma special_psi
special_round special_sinc sqrt square tan tanh tanhshrink threshold _threshold trunc zeros_like dropout alpha_dropout
__invert__ __neg__ __pos__ __abs__ cdouble cfloat native_dropout
"""
_BINARY = """
add arctan2 atan2 bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor copysign div divide eq
float_power floor_divide fmax fmin fmod gcd ge greater greater_equal gt heaviside hypot igamma igammac isclose lcm
ldexp le less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor lt maximum minimum mul multiply ne
nextafter not_equal pow remainder rsub special_gammainc special_gammaincc special_xlog1py special_xlogy special_zeta
sub subtract true_divide xlogy clamp clamp_max clamp_min clip where masked_fill lerp addcdiv addcmul binomial
complex polar
"""
_OPERATORS = sorted(_words("add sub mul div truediv floordiv mod pow and or xor lshift rshift"))

ELEMENTWISE = frozenset(
    _UNARY.split()
    + _BINARY.split()
    + [f"__{side}{name}__" for name in _OPERATORS for side in ("", "r")]
    + [f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge")]
)
_CHANGING = """
abs absolute acos acosh add addcdiv addcmul arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan
atan2 atanh bernoulli bitwise_and bitwise_not bitwise_or bitwise_xor cauchy ceil celu clamp clamp_max clamp_min clip
copy copysign cos cosh deg2rad detach digamma div divide elu eq erf erfc erfinv exp exp2 expm1 exponential fill fix
float_power floor floor_divide fmod frac ge geometric gt heaviside hypot i0 le leaky_relu lerp lgamma log log10
log1p log2 log_normal logical_and logical_not logical_or logical_xor logit lt masked_fill mul multiply nan_to_num ne
neg negative normal pow rad2deg random reciprocal relu remainder requires_grad round rsqrt selu sgn sigmoid sign sin
sinc sinh sqrt square sub subtract tan tanh true_divide trunc uniform xlogy zero
"""
IN_PLACE = frozenset([f"{name}_" for name in _CHANGING.split()] + [f"__i{name}__" for name in _OPERATORS])

# Of each number of the first argument, with plain tensors that are the same for all.
FIRST = _words("bucketize isin embedding")
CASTS = _words("to type type_as cpu cuda pin_memory")

# Where the dimensions stand among the arguments, and what is meant where they are missing: None is all of them, or
# something that should be said.
ALONG: dict[str, tuple[int, object]] = {
    **dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "logsumexp", "std", "var", "nansum", "nanmean"), (1, None)),
    **dict.fromkeys(("argmax", "argmin", "median", "nanmedian", "std_mean", "var_mean"), (1, None)),
    **dict.fromkeys(("count_nonzero", "aminmax", "softmax", "log_softmax", "softmin"), (1, None)),
    **dict.fromkeys(("special_softmax", "special_log_softmax", "special_logsumexp"), (1, None)),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "squeeze", "flatten"), (1, None)),
    **dict.fromkeys(("unbind", "select", "index_select", "narrow", "unflatten", "unfold"), (1, None)),
    **dict.fromkeys(("sort", "argsort", "mode", "glu"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue", "diff"), (2, -1)),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), (2, None)),
    **dict.fromkeys(("roll", "norm", "quantile", "nanquantile", "repeat_interleave"), (2, None)),
    **dict.fromkeys(("linalg_vector_norm", "linalg_norm"), (2, None)),
    "normalize": (2, 1),
    "gumbel_softmax": (4, -1),
}
# Those that take several dimensions one after another.
MANY = frozenset(("flip", "flatten", "squeeze"))

# Of tensors whose items repeat (stochastic_graph/repeated.py). What has to see every item: noise differs from item to
# item, statistics count them, and another tensor's shape is that of all. What takes sizes; attributes that are views;
# what can be said without the numbers; what leaves a tensor as it is, and computes nothing of it or does; what torch
# does for tensors of its own class alone; and what gathers items itself.
RANDOM = _words(
    "bernoulli binomial poisson rand_like randint_like randn_like empty_like rrelu dropout alpha_dropout "
    "native_dropout dropout1d dropout2d dropout3d gumbel_softmax"
)
APART = RANDOM | _words("instance_norm view_as reshape_as expand_as")
SIZES = _words("reshape view expand broadcast_to")
VIEWS = _words(".mT .mH .real .imag")
OF_SHAPE = _words(
    "__len__ dim ndimension numel nelement size element_size is_floating_point is_complex get_device "
    "new_zeros new_ones new_full new_empty .shape .ndim .dtype .device .requires_grad .is_leaf .grad_fn .layout "
    ".is_cuda .itemsize .names"
)
ASKING = _words("equal allclose is_nonzero item tolist all any __bool__ __float__ __int__ stride is_contiguous")
LEAVING = _words("as_subclass grad")
OF_MEMORY = _words("tolist numpy __array__ __dlpack__ __dlpack_device__")
GATHERING = _words("binary_cross_entropy")

# Their arguments are of one shape.
LOSSES = _words(
    "binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss huber_loss kl_div "
    "soft_margin_loss poisson_nll_loss"
)
MATRICES = _words(
    "tril triu det logdet slogdet inverse pinverse cholesky matrix_exp matrix_power adjoint linalg_cholesky "
    "linalg_det linalg_inv linalg_matrix_exp linalg_matrix_power linalg_pinv linalg_qr linalg_slogdet "
    "linalg_svdvals linalg_eigvalsh linalg_eigh linalg_svd"
)

REFUSED = {
    **dict.fromkeys(_words("mm bmm mv dot addmm addmv baddbmm bilinear tensordot inner outer vdot ger"), "use @"),
    **dict.fromkeys(("t", "numpy_T"), "use .mT, which exchanges the last two dimensions"),
    **dict.fromkeys(("multinomial",), "sample by calling a method, as in method.ScoreFunction('z')(distribution)"),
}
