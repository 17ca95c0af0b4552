// Colours of the figures on a light and on a dark page, and pictures of them for the printer.

const LIGHT = { ink: "#1d2126", text: "#1d2126", soft: "#555b63", grid: "#e4e6e9", edge: "white" };
const DARK = { ink: "#f0f2f4", text: "#e6e8ea", soft: "#aab1b9", grid: "#33383f", edge: "#15181c" };

function colourFigures(doc, dark) {
  const look = dark ? DARK : LIGHT;
  for (const plot of doc.roots()) {
    for (const axis of [...plot.below, ...plot.left]) {
      axis.setv({
        axis_label_text_color: look.text, major_label_text_color: look.soft,
        axis_line_color: look.soft, major_tick_line_color: look.soft,
      });
    }
    for (const part of plot.center) {
      if (part.tags.includes("ink")) part.line_color = look.soft;
      else if ("grid_line_color" in part) part.grid_line_color = look.grid;
    }
    for (const bar of plot.right) {
      bar.setv({ major_label_text_color: look.soft, major_tick_line_color: look.edge });
    }
    for (const renderer of plot.renderers) {
      if (renderer.glyph === undefined) continue;
      if (renderer.tags.includes("ink")) renderer.glyph.line_color = { value: look.ink };
      else if (renderer.glyph.marker !== undefined) {
        renderer.glyph.line_color = { value: look.edge };
      }
    }
  }
}

// The printer gets vector pictures: a canvas neither scales to the paper nor stays sharp.
function picturesForPrint(plots) {
  for (const plot of plots) {
    const host = document.getElementById(plot.name);
    const drawing = Bokeh.index.get(plot).export("svg").canvas;
    const [width, height] = ["width", "height"].map((side) => parseFloat(drawing.getAttribute(side)));
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.removeAttribute("width");
    drawing.removeAttribute("height");
    drawing.classList.add("for-print");
    drawing.setAttribute("aria-hidden", "true");
    host.append(drawing);
  }
}

function removePictures() {
  for (const drawing of document.querySelectorAll("svg.for-print")) drawing.remove();
}
