// Reads the page's data, draws, and lets the reader's controls act.

const ALL = ["paper", "steps", "trajectories", "heat", "by_layer", "cloud", "heads"];
const MOVING = ["steps", "by_layer", "heads"];

const byId = (id) => document.getElementById(id);

function readState(model) {
  return {
    step: model.steps[model.steps.length - 1],
    role: 0,
    magnitude: "delta_magnitude",
    measure: "delta_magnitude",
    headMeasure: "delta_direction",
    unitMeasure: "unit_coupling",
    hiddenLayers: new Set(),
    hiddenMethods: new Set(),
    site: -1,
    snapshot: 0,
    unitSite: 0,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
  };
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser is too old for this page: it has no DecompressionStream");
  }
  const data = JSON.parse(byId("report-data").textContent);
  const { docs, roots, panels } = JSON.parse(byId("report-figures").textContent);
  await unpackAll(data);
  const model = new Model(data);
  const state = readState(model);
  Bokeh.set_log_level("warn");
  const doc = Bokeh.require("document").Document.from_json(JSON.parse(await unpack(docs)).page);
  const charts = new Charts(model, state, doc, panels);
  const page = new Page(model, state, doc, charts, new Tables(model, state, charts, panels), panels);
  shortTicks(doc);
  page.start();
  const places = doc.roots().map((plot) => byId(roots[plot.id]));
  await Bokeh.embed.add_document_standalone(doc, document.body, places);
  for (const plot of doc.roots()) {
    // The chart's place takes the focus: it has a name, and answers to the arrow keys.
    Bokeh.index.get(plot).canvas_view.events_el.tabIndex = -1;
  }
  charts.watch();
  window.doraReport = { model, state, doc, page };
  document.body.dataset.ready = "yes";
}

class Page {
  constructor(model, state, doc, charts, tables, panels) {
    Object.assign(this, { model, state, doc, charts, tables, panels });
    this.timer = null;
    this.frame = null;
  }

  start() {
    colourFigures(this.doc, this.state.dark);
    document.querySelector("form.controls").addEventListener("submit", (event) => event.preventDefault());
    this.connectStep();
    this.connectChoices();
    this.connectLegend();
    this.connectSite();
    this.connectPoints();
    this.connectGrids();
    this.connectTables();
    this.connectMedia();
    this.draw(ALL);
  }

  draw(kinds) {
    this.charts.draw(kinds);
    this.tables.draw(kinds);
  }

  // Slider, its step in words, and the button that plays.
  connectStep() {
    const { model, state } = this;
    const slider = byId("step");
    const last = model.steps.length - 1;
    slider.max = last;
    slider.value = last;
    const show = () => {
      state.step = model.steps[Number(slider.value)];
      const words = state.step.toLocaleString("en");
      slider.setAttribute("aria-valuetext", `step ${words}`);
      for (const place of document.querySelectorAll(".step-now")) place.textContent = words;
    };
    const move = () => {
      show();
      if (this.frame !== null) return;
      this.frame = requestAnimationFrame(() => {
        this.frame = null;
        this.draw(MOVING);
        this.charts.mark();
        this.tellSite();
      });
    };
    slider.addEventListener("input", move);
    const button = byId("play");
    const stop = () => {
      clearInterval(this.timer);
      this.timer = null;
      button.setAttribute("aria-label", "Play the steps");
      button.textContent = "▶";
    };
    button.addEventListener("click", () => {
      if (this.timer !== null) return stop();
      if (Number(slider.value) === last) slider.value = 0;
      button.setAttribute("aria-label", "Pause");
      button.textContent = "❚❚";
      const stride = Math.max(1, Math.round(last / 80));
      this.timer = setInterval(() => {
        slider.value = Math.min(last, Number(slider.value) + stride);
        move();
        if (Number(slider.value) >= last) stop();
      }, 120);
    });
    show();
  }

  connectChoices() {
    const choices = {
      role: ["role", Number, ALL],
      magnitude: ["magnitude", String, ["steps", "heat"]],
      measure: ["measure", String, ["trajectories"]],
      "head-measure": ["headMeasure", String, ["heads"]],
      "unit-measure": ["unitMeasure", String, ["by_layer"]],
      snapshot: ["snapshot", Number, []],
      "unit-site": ["unitSite", Number, ["cloud"]],
    };
    for (const [id, [name, type, kinds]] of Object.entries(choices)) {
      const choice = byId(id);
      if (choice === null) continue;
      choice.addEventListener("change", () => {
        this.state[name] = type(choice.value);
        if (id === "snapshot") this.offerUnits();
        if (id === "role") this.nameRole();
        this.nameMeasures();
        this.draw(kinds);
      });
    }
    if (byId("snapshot") !== null) this.offerUnits();
    if (byId("role") !== null) this.nameRole();
    this.nameMeasures();
    for (const button of document.querySelectorAll("button[data-reset]")) {
      button.addEventListener("click", () => {
        for (const panel of this.panels) {
          if (panel.kind === button.dataset.reset) {
            Bokeh.index.get(this.charts.plot(panel)).reset();
            this.charts.limits.delete(panel.id);
          }
        }
        this.draw([button.dataset.reset]);
      });
    }
  }

  nameMeasures() {
    const { magnitude, measure, headMeasure, unitMeasure } = this.state;
    const title = this.model.measures[magnitude].title;
    for (const [kind, name] of Object.entries({
      magnitude, trajectories: measure, heads: headMeasure, by_layer: unitMeasure,
    })) {
      for (const place of document.querySelectorAll(`.${kind}-now`)) {
        place.textContent = this.model.measures[name].title;
      }
    }
    for (const panel of this.panels) {
      if (panel.kind === "steps") this.charts.plot(panel).left[0].axis_label = title;
    }
  }

  nameRole() {
    const { model, state } = this;
    for (const place of document.querySelectorAll(".role-now")) {
      place.textContent = model.roles[state.role];
    }
    for (const place of document.querySelectorAll("[data-fit]")) {
      const fit = model.fits[state.role][Number(place.dataset.fit)];
      place.textContent = [fit.r, fit.rest].filter(Boolean).join("; ");
    }
  }

  // The weights of the chosen run's kept units.
  offerUnits() {
    const { sites } = this.model.units.snapshots[this.state.snapshot];
    const choice = byId("unit-site");
    choice.replaceChildren(
      ...sites.map((site, number) => {
        const part = site.count < site.units ? ` (${site.count} of ${site.units} units)` : "";
        return new Option(site.site + part, number);
      }),
    );
    this.state.unitSite = 0;
    this.draw(["cloud"]);
  }

  connectLegend() {
    const redraw = () => this.draw(ALL.filter((kind) => kind !== "cloud" && kind !== "heat"));
    const boxes = (name) => [...document.querySelectorAll(`input[name="${name}"]`)];
    const read = () => {
      for (const [name, hidden] of [
        ["layer", this.state.hiddenLayers], ["method", this.state.hiddenMethods],
      ]) {
        hidden.clear();
        for (const box of boxes(name)) if (!box.checked) hidden.add(Number(box.value));
      }
      for (const part of document.querySelectorAll("[data-method]")) {
        part.hidden = this.state.hiddenMethods.has(Number(part.dataset.method));
      }
      for (const grid of document.querySelectorAll(".grid[data-methods]")) {
        const shownMethods = this.model.methods.length - this.state.hiddenMethods.size;
        grid.style.setProperty("--columns", Math.max(1, shownMethods));
      }
      redraw();
    };
    for (const box of [...boxes("layer"), ...boxes("method")]) box.addEventListener("change", read);
    for (const button of document.querySelectorAll("button[data-all]")) {
      button.addEventListener("click", () => {
        const all = boxes(button.dataset.all);
        const some = all.every((box) => box.checked);
        for (const box of all) box.checked = !some;
        read();
      });
    }
    this.colourLegend();
  }

  colourLegend() {
    for (const swatch of document.querySelectorAll(".swatch[data-layer]")) {
      const layer = this.model.layers[Number(swatch.dataset.layer)];
      swatch.style.backgroundColor = this.state.dark ? layer.dark : layer.light;
    }
  }

  connectSite() {
    const field = byId("site");
    const list = byId("sites");
    list.replaceChildren(...this.model.sites.map((site) => new Option(site)));
    field.addEventListener("change", () => this.choose(this.model.sites.indexOf(field.value)));
    byId("site-clear").addEventListener("click", () => this.choose(-1));
  }

  choose(site) {
    this.state.site = site;
    byId("site").value = site < 0 ? "" : this.model.sites[site];
    this.draw(["paper", "steps", "trajectories", "by_layer"]);
    this.tellSite();
  }

  // The chosen weight in words, at the step of the slider.
  tellSite() {
    const { model, state } = this;
    const place = byId("site-told");
    if (state.site < 0) {
      place.textContent = "";
      return;
    }
    const words = [];
    for (let line = 0; line < model.count && words.length < 12; line++) {
      if (model.lines.site[line] !== state.site) continue;
      const column = model.column(model.run(line), state.step);
      if (column >= 0) words.push(this.tell(line, column));
    }
    place.textContent = `${model.sites[state.site]} at step ${state.step.toLocaleString("en")}. ${words.join(" ")}`;
  }

  tell(line, column) {
    const { model } = this;
    const of = (measure) => shown(model.value(measure, line, column));
    const head = model.lines.head[line] < 0 ? "" : `, head ${model.lines.head[line]}`;
    return `${model.run(line).name}${head}: ΔD ${of("delta_direction")}, ΔM ${of("delta_magnitude")}, ` +
      `signed ${shown(model.value("signed_delta_magnitude", line, column), true)}.`;
  }

  // Points and lines: a click chooses the weight; arrow keys go from one to the next.
  connectPoints() {
    for (const panel of this.panels) {
      const source = this.charts.source(panel, "points") ?? this.charts.source(panel, "lines");
      if (source === null || panel.kind === "cloud") continue;
      source.selected.properties.indices.change.connect(() => {
        const [first] = source.selected.indices;
        if (first !== undefined) this.choose(this.model.lines.site[source.data.series[first]]);
      });
      this.connectKeys(panel, (move) => {
        const { series } = source.data;
        if (series.length === 0) return "Nothing is shown.";
        panel.at = ((panel.at ?? (move > 0 ? -1 : 0)) + move + series.length) % series.length;
        const line = series[panel.at];
        this.choose(this.model.lines.site[line]);
        const step = source.data.step ? source.data.step[panel.at] : this.state.step;
        const column = this.model.column(this.model.run(line), step);
        return `${this.model.site(line)}, step ${step.toLocaleString("en")}. ${this.tell(line, column)}`;
      });
    }
  }

  // Heat maps: the cell below the pointer, or the one that the arrow keys reached.
  connectGrids() {
    for (const panel of this.panels) {
      if (panel.kind !== "heat" && panel.kind !== "heads") continue;
      const plot = this.charts.plot(panel);
      const told = document.querySelector(`#${CSS.escape(panel.id)} + .readout`);
      const at = (row, column) => {
        const { rows, steps, values, counts } = panel.grid;
        if (row < 0 || column < 0 || row >= rows.length || column >= steps.length) return "";
        const cell = row * steps.length + column;
        const across = panel.kind === "heat" ? "step" : "head";
        const of = counts[cell] === 1 ? "" : ` (mean of ${counts[cell]})`;
        return `layer ${this.model.rows[rows[row]]}, ${across} ${steps[column].toLocaleString("en")}: ` +
          `${shown(values[cell])}${of}`;
      };
      plot.on_event("mousemove", (event) => {
        told.textContent = at(Math.round(event.y), Math.round(event.x));
      });
      plot.on_event("mouseleave", () => (told.textContent = ""));
      this.connectKeys(panel, (across, down) => {
        const { rows, steps } = panel.grid;
        const now = panel.at ?? [0, 0];
        panel.at = panel.at === undefined ? now : [
          Math.min(rows.length - 1, Math.max(0, now[0] + down)),
          Math.min(steps.length - 1, Math.max(0, now[1] + across)),
        ];
        return at(...panel.at);
      });
    }
  }

  connectKeys(panel, move) {
    const host = byId(panel.id);
    const told = host.parentElement.querySelector(".readout");
    const keys = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    host.addEventListener("keydown", (event) => {
      const direction = keys[event.key];
      if (direction === undefined) return;
      event.preventDefault();
      const flat = panel.kind !== "heat" && panel.kind !== "heads";
      told.textContent = flat ? move(direction[0] + direction[1], 0) : move(...direction);
    });
  }

  connectTables() {
    for (const details of document.querySelectorAll("details[data-table]")) {
      details.addEventListener("toggle", () => {
        if (details.open) this.tables.fill(details, details.dataset.table);
      });
    }
  }

  connectMedia() {
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const recolour = (dark) => {
      this.state.dark = dark;
      colourFigures(this.doc, dark);
      this.colourLegend();
      this.charts.draw(ALL.filter((kind) => kind !== "heat" && kind !== "heads"));
    };
    scheme.addEventListener("change", () => recolour(scheme.matches));
    addEventListener("beforeprint", () => {
      recolour(false);
      this.charts.refreshAll();
      removePictures();
      const visible = this.doc.roots().filter((plot) => byId(plot.name).offsetWidth > 0);
      picturesForPrint(visible);
    });
    addEventListener("afterprint", () => {
      removePictures();
      recolour(scheme.matches);
    });
  }
}

start().catch((error) => {
  console.error(error);
  const place = byId("failed");
  place.hidden = false;
  place.textContent = `The charts cannot be drawn: ${error.message}. Tables and text below stand.`;
});
