"""The way of a picture as ONNX nodes: pixels of any size in, those that the network sees out.

What `data.pictures.reading.to_square` does: the largest centred square, antialiased bicubic, across
first and then down, rounded to whole numbers after each. Each of both is a product with a matrix of
weights that the graph computes from the picture's size, so that any runtime has what it takes.
ONNX' own operator `Resize` has the same filter since opset 18, but no square that begins in the
middle of a pixel, and it leaves out the pixels beside the square, which Pillow's filter sees.
"""

import onnx
import onnx.inliner
import onnx.parser

# The text format of the package onnx. Numbers are float64 until the weights are known, as Pillow's
# are; `images` may be any number of pictures of one size.
_TEXT = """
<ir_version: 8, opset_import: ["" : 17, "normlab" : 1]>
reading (uint8[N, H, W, 3] images) => (float[N, 3, {size}, {size}] pixels)
{{
    shape = Shape <start = 1, end = 3> (images)
    own_shape = Constant <value_ints = [{size}, {size}]> ()
    fits = Equal (shape, own_shape)
    fits_01 = Cast <to = 6> (fits)
    both_fit = ReduceMin <keepdims = 0> (fits_01)
    as_is = Cast <to = 9> (both_fit)
    channels_first = Transpose <perm = [0, 3, 1, 2]> (images)
    values = Cast <to = 1> (channels_first)
    pixels = If (as_is) <
        then_branch = as_it_is () => (float[N, 3, {size}, {size}] unchanged)
        {{
            unchanged = Identity (values)
        }},
        else_branch = resized () => (float[N, 3, {size}, {size}] square)
        {{
            side = ReduceMin <keepdims = 0> (shape)
            height, width = Split <axis = 0> (shape)
            across = normlab.weights (width, side)
            across_turned = Transpose <perm = [1, 0]> (across)
            narrow = MatMul (values, across_turned)
            narrow_whole = normlab.rounded (narrow)
            down = normlab.weights (height, side)
            small = MatMul (down, narrow_whole)
            square = normlab.rounded (small)
        }}
    >
}}
<opset_import: ["" : 17], domain: "normlab">
rounded (x) => (whole)
{{
    half = Constant <value = float {{0.5}}> ()
    low = Constant <value = float {{0.0}}> ()
    high = Constant <value = float {{255.0}}> ()
    x_and_half = Add (x, half)
    floored = Floor (x_and_half)
    whole = Clip (floored, low, high)
}}
<opset_import: ["" : 17], domain: "normlab">
weights (length, side) => (matrix)
{{
    zero = Constant <value = double {{0.0}}> ()
    half = Constant <value = double {{0.5}}> ()
    one = Constant <value = double {{1.0}}> ()
    two = Constant <value = double {{2.0}}> ()
    four = Constant <value = double {{4.0}}> ()
    three_halves = Constant <value = double {{1.5}}> ()
    five_halves = Constant <value = double {{2.5}}> ()
    size = Constant <value = double {{{size}.0}}> ()
    first_axis = Constant <value_ints = [0]> ()
    last_axis = Constant <value_ints = [1]> ()

    whole_n = Squeeze (length, first_axis)
    n = Cast <to = 11> (whole_n)
    d = Cast <to = 11> (side)
    scale = Div (d, size)
    spread = Max (scale, one)
    margin = Sub (n, d)
    start = Mul (margin, half)
    places = Range (half, size, one)
    offsets = Mul (places, scale)
    centres = Add (start, offsets)
    centre = Unsqueeze (centres, last_axis)
    pixel = Range (half, n, one)
    away = Sub (pixel, centre)
    distance = Abs (away)
    t = Div (distance, spread)

    a = Mul (t, three_halves)
    b = Sub (a, five_halves)
    c = Mul (b, t)
    e = Mul (c, t)
    near = Add (e, one)
    f = Mul (t, half)
    g = Sub (five_halves, f)
    h = Mul (g, t)
    i = Sub (h, four)
    j = Mul (i, t)
    far = Add (j, two)
    below_one = Less (t, one)
    below_two = Less (t, two)
    far_or_none = Where (below_two, far, zero)
    cubic = Where (below_one, near, far_or_none)
    total = ReduceSum (cubic, last_axis)
    shares = Div (cubic, total)
    matrix = Cast <to = 1> (shares)
}}
"""


def reading(size: int) -> onnx.GraphProto:
    """Make the graph: `images` uint8 (N, H, W, 3) → `pixels` float32 (N, 3, size, size), 0 to 255.

    The weight of a pixel whose centre is t pixels of the result away from the centre of a pixel of
    the result (t in pixels of the picture where that is the larger of both), for a = −1/2:

        1.5·t³ − 2.5·t² + 1 for t < 1;   −0.5·t³ + 2.5·t² − 4·t + 2 for t < 2;   else 0

    divided by the sum of all weights (Keys 1981; Pillow's BICUBIC).
    """
    model = onnx.inliner.inline_local_functions(onnx.parser.parse_model(_TEXT.format(size=size)))
    return model.graph


def with_reading(network: onnx.ModelProto, size: int) -> onnx.ModelProto:
    """`network`, which takes pictures of `size` alone, such that it takes those of any size.

    Args:
        network: its first nodes make `pixels` float32 (N, 3, size, size) of `images` uint8
            (N, size, size, 3).
    """
    model = onnx.ModelProto()
    model.CopyFrom(network)
    graph, before = model.graph, reading(size)
    last = next(i for i, node in enumerate(graph.node) if "pixels" in node.output)
    nodes = [*before.node, *graph.node[last + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.input[:]
    graph.input.extend(before.input)
    onnx.checker.check_model(model, full_check=True)
    return model
