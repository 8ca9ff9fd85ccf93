"""C++ and JavaScript functions: whole, with their comment apart; doubtful ones left out."""

from __future__ import annotations

import pytest

from ruler.generation.brace_functions import brace_functions, closing_brace, masked_text

JAVASCRIPT = r"""
;(function() {
  /** Used for nothing. */
  var nothing = /[{"]/g;

  /**
   * Joins the parts of a text, {braces} and all.
   *
   * @param {Array} parts The parts.
   */
  function joinParts(parts) {
    var open = "{", ratio = parts.length / 2; // }
    return parts.map(function(part) { return part.replace(/[}]/g, `{${open}`); });
  }

  /** Not before a function. */
  joinParts([]);

  function undocumented() { return 1; }

  /** Outer one that has an inner one. */
  function outer() {
    /** Inner one. */
    function inner() { return 2; }
    return inner;
  }

  // Adds two numbers
  // of any kind.
  async function addBoth(a, b) {
    return a + b;
  }
}.call(this));
"""
CPP = r"""
namespace books {

/// Rounds a sum up to
/// the next full unit.
template <typename T>
inline T round_up(T sum, const std::vector<int>& units = default_units()) noexcept {
  if (sum > 1'000) { return '{'; }
  return sum + R"(})" [0];
}

// Not a function but a class.
class Ledger {
 public:
  /* Tells how many there are. */
  size_t size() const override {
    return size_;
  }

  // Makes a ledger.
  Ledger(int size) : size_(size) {}

  // Frees it.
  ~Ledger() { free(); }

  // Calls it.
  void operator()(int x) { call(x); }
};

// Depends on the platform.
int platform() {
#ifdef WIN
  return 1;
#endif
  return 2;
}

// Only declared.
int declared(int x);

// Two lines away.

int distant(int x) { return x; }

// Directly before.
auto behind(int x) -> std::vector<int> { return {x}; }
}
"""


def test_javascript() -> None:
    found = {name: (code, text) for name, code, text in brace_functions(JAVASCRIPT, "javascript")}
    assert set(found) == {"joinParts", "inner", "addBoth"}
    code, text = found["joinParts"]
    assert code.startswith("function joinParts(parts) {\n  var open")
    assert code.endswith("});\n}")
    assert text.splitlines()[0] == "Joins the parts of a text, {braces} and all."
    assert "@param {Array} parts The parts." in text
    assert found["addBoth"][1] == "Adds two numbers\nof any kind."


def test_cpp() -> None:
    found = {name: (code, text) for name, code, text in brace_functions(CPP, "cpp")}
    # Constructors, destructors, operators, declarations, platform-dependent bodies and distant comments are left out.
    assert set(found) == {"round_up", "size", "behind"}
    code, text = found["round_up"]
    assert code.startswith("template <typename T>\ninline T round_up(")
    assert code.endswith("[0];\n}")
    assert text == "Rounds a sum up to\nthe next full unit."
    assert found["size"] == ("size_t size() const override {\n  return size_;\n}", "Tells how many there are.")


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("a / b / c", "javascript", "a / b / c"),
        ("x = /a{/g;", "javascript", "x =     g;"),
        ("return /}/", "javascript", "return    "),
        ("x = a /b/ c", "cpp", "x = a /b/ c"),
        ("'\\'' // {\n{", "cpp", "         \n{"),
    ],
)
def test_what_is_no_code_is_blank(text: str, language: str, expected: str) -> None:
    masked = masked_text(text, language)
    assert len(masked) == len(text)
    assert masked == expected


def test_braces() -> None:
    assert closing_brace("{a{b}c}d", 0) == 7
    assert closing_brace("{a{b}c", 0) is None
