"""Operations that take less of a tensor than its values, by name."""

# The values of these do not depend on any tensor given, or on the first one only.
BLANK = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"} | {
    f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn")
}
# The second tensor of these only lends its type or shape.
LIKE_ANOTHER = {"type_as", "to", "expand_as", "view_as", "reshape_as"}
