// Ticks as people write them: plain numbers, or all of an axis with one power of ten.

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

function tickTexts(ticks) {
  const largest = Math.max(...ticks.map(Math.abs));
  if (!(largest > 0)) return ticks.map(() => "0");
  const plain = largest >= 5e-3 && largest < 1e5;
  const exponent = plain ? 0 : Math.floor(Math.log10(largest));
  const power = [...String(Math.abs(exponent))].map((digit) => SUPERSCRIPTS[digit]).join("");
  const scaled = ticks.map((tick) => Number((tick / 10 ** exponent).toPrecision(6)));
  const digits = Math.max(...scaled.map((value) => (String(value).split(".")[1] ?? "").length));
  return scaled.map((value) => {
    if (value === 0) return "0";
    const text = Math.abs(value).toLocaleString("en", {
      minimumFractionDigits: digits, maximumFractionDigits: digits,
    });
    const sign = value < 0 ? "−" : "";
    return plain ? sign + text : `${sign}${text}×10${exponent < 0 ? "⁻" : ""}${power}`;
  });
}

function shortTicks(doc) {
  const { TickFormatter } = Bokeh.require("models/formatters/tick_formatter");
  class ShortTicks extends TickFormatter {
    doFormat(ticks) {
      return tickTexts(ticks);
    }
  }
  ShortTicks.__name__ = "ShortTicks";
  for (const plot of doc.roots()) {
    for (const axis of [...plot.below, ...plot.left, ...plot.right]) axis.formatter = new ShortTicks();
  }
}
