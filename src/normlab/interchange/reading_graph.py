"""The way of a picture as ONNX nodes: pixels of any size in, those that the network sees out.

What `data.pictures.reading.to_square` does: the largest centred square, antialiased bicubic, across
first and then down, rounded to whole numbers after each. Each of both is a product with a matrix of
weights that the graph computes from the picture's size, so that any runtime has what it takes.
Pillow's weights are whole multiples of 2⁻²², which decides how ties are rounded. So are these, in
two parts, a·2⁻¹¹ + b·2⁻²², with which float32 adds up without an error, or nearly so: edges between
areas of one colour are full of ties.
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
            across_a, across_b = normlab.weights (width, side)
            turned_a = Transpose <perm = [1, 0]> (across_a)
            turned_b = Transpose <perm = [1, 0]> (across_b)
            narrow_a = MatMul (values, turned_a)
            narrow_b = MatMul (values, turned_b)
            narrow = normlab.rounded (narrow_a, narrow_b)
            down_a, down_b = normlab.weights (height, side)
            small_a = MatMul (down_a, narrow)
            small_b = MatMul (down_b, narrow)
            square = normlab.rounded (small_a, small_b)
        }}
    >
}}
<opset_import: ["" : 17], domain: "normlab">
rounded (sum_a, sum_b) => (result)
{{
    step = Constant <value = double {{2048.0}}> ()
    unit = Constant <value = double {{4194304.0}}> ()
    half = Constant <value = double {{0.5}}> ()
    low = Constant <value = double {{0.0}}> ()
    high = Constant <value = double {{255.0}}> ()
    a = Cast <to = 11> (sum_a)
    b = Cast <to = 11> (sum_b)
    steps = Mul (a, step)
    units = Add (steps, b)
    x = Div (units, unit)
    x_and_half = Add (x, half)
    floored = Floor (x_and_half)
    whole = Clip (floored, low, high)
    result = Cast <to = 1> (whole)
}}
<opset_import: ["" : 17], domain: "normlab">
weights (length, side) => (matrix_a, matrix_b)
{{
    step = Constant <value = double {{2048.0}}> ()
    unit = Constant <value = double {{4194304.0}}> ()
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

    in_units = Mul (shares, unit)
    units = Round (in_units)
    in_steps = Div (units, step)
    steps = Round (in_steps)
    units_of_steps = Mul (steps, step)
    rest = Sub (units, units_of_steps)
    matrix_a = Cast <to = 1> (steps)
    matrix_b = Cast <to = 1> (rest)
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
        network: its nodes that give `channels_first` and `pixels` make `pixels` float32
            (N, 3, size, size) of `images` uint8 (N, size, size, 3).
    """
    model = onnx.ModelProto()
    model.CopyFrom(network)
    graph, before = model.graph, reading(size)
    replaced = (["channels_first"], ["pixels"])
    nodes = [*before.node, *(node for node in graph.node if [*node.output] not in replaced)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # shapes that a tool has noted are those of its own size
    del graph.input[:]
    graph.input.extend(before.input)
    onnx.checker.check_model(model, full_check=True)
    return model
