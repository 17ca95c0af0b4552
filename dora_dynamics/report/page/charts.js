// Fills the empty figures of panels.py. Each function draws one kind of chart from the model.

const MARKER_SCALE = { triangle: 1.15, square: 0.9, diamond: 1.1, circle: 1.0 };
const CROWDED = 150;

class Charts {
  constructor(model, state, doc, panels) {
    this.model = model;
    this.state = state;
    this.doc = doc;
    this.panels = panels;
    this.limits = new Map();
  }

  source(panel, what) {
    return this.doc.get_model_by_name(`${panel.id}:${what}`);
  }

  plot(panel) {
    return this.doc.get_model_by_name(panel.id);
  }

  role(panel) {
    return panel.role === null ? this.state.role : panel.role;
  }

  isShown(line) {
    return !this.state.hiddenLayers.has(this.model.lines.layer[line]);
  }

  lines(panel) {
    return this.model.select(panel.method, this.role(panel), (line) => this.isShown(line));
  }

  colour(line) {
    const layer = this.model.layers[this.model.lines.layer[line]];
    return this.state.dark ? layer.dark : layer.light;
  }

  // Draw the panels of some kinds; those out of view wait until they come into it.
  draw(kinds) {
    for (const panel of this.panels) if (kinds.includes(panel.kind)) this.ask(panel, "all");
  }

  // Move the lines that mark the step of the slider.
  mark() {
    for (const panel of this.panels) {
      if (panel.kind === "trajectories" || panel.kind === "heat") this.ask(panel, "cursor");
    }
  }

  ask(panel, what) {
    if (panel.stale !== "all") panel.stale = what;
    if (panel.inView !== false) this.refresh(panel);
  }

  refresh(panel) {
    if (this.state.hiddenMethods.has(panel.method)) return;
    const { stale } = panel;
    panel.stale = null;
    if (stale === "all") {
      this.tellAbsence(panel);
      this[panel.kind](panel);
    } else if (stale === "cursor" && panel.kind === "heat") this.moveHeatCursor(panel);
    else if (stale === "cursor") this.moveCursor(panel, this.state.step);
  }

  // In place of empty axes, where no run of the method has a weight of the role.
  tellAbsence(panel) {
    if (panel.method === null) return;
    const isAbsent = this.model.select(panel.method, this.role(panel)).length === 0;
    document.getElementById(panel.id).closest("figure").classList.toggle("absent", isAbsent);
  }

  refreshAll() {
    for (const panel of this.panels) this.refresh(panel);
  }

  // Learn which panels are in view.
  watch() {
    const byHost = new Map(this.panels.map((panel) => [document.getElementById(panel.id), panel]));
    const observer = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const panel = byHost.get(entry.target);
          panel.inView = entry.isIntersecting;
          if (panel.inView) this.refresh(panel);
        }
      },
      { rootMargin: "200px" },
    );
    for (const host of byHost.keys()) observer.observe(host);
  }

  // Columns of a scatter: one point for each (line, column of its run).
  points(panel, pairs, x, y, marker) {
    const { model } = this;
    const size = Math.max(5, 9 * Math.min(1, Math.sqrt(CROWDED / Math.max(1, pairs.length))));
    const data = {
      x: [], y: [], site: [], run: [], layer: [], step: [], colour: [], marker: [], size: [],
      r: [], slope: [], change: [], series: [],
    };
    const ring = { x: [], y: [] };
    for (const [line, column, place] of pairs) {
      const at = [x(line, column), y(line, column)];
      if (!Number.isFinite(at[0]) || !Number.isFinite(at[1])) continue;
      const run = model.run(line);
      const kind = marker(place);
      data.x.push(at[0]);
      data.y.push(at[1]);
      data.site.push(model.site(line));
      data.run.push(run.name);
      data.layer.push(model.rows[model.lines.row[line]]);
      data.step.push(run.steps[column]);
      data.colour.push(this.colour(line));
      data.marker.push(kind);
      data.size.push(size * MARKER_SCALE[kind]);
      data.r.push(model.value("unit_coupling", line, column));
      data.slope.push(model.value("unit_slope", line, column));
      data.change.push(NaN);
      data.series.push(line);
      if (model.lines.site[line] === this.state.site) {
        ring.x.push(at[0]);
        ring.y.push(at[1]);
      }
    }
    this.source(panel, "points").data = data;
    this.source(panel, "ring").data = ring;
  }

  paper(panel) {
    const { model } = this;
    const pairs = this.lines(panel).flatMap((line) => {
      const columns = model.run(line).checkpoints;
      const first = model.markers.length - columns.length;
      return columns.map((column, place) => [line, column, first + place]);
    });
    const fit = model.fits[this.role(panel)][panel.method];
    this.source(panel, "line").data = { x: fit.x, y: fit.y };
    this.points(
      panel,
      pairs,
      (line, column) => model.value("delta_direction", line, column),
      (line, column) => model.value("delta_magnitude", line, column),
      (place) => model.markers[place],
    );
  }

  steps(panel) {
    const { model } = this;
    const measure = this.state.magnitude;
    const lines = this.lines(panel);
    const paths = { xs: [], ys: [], colour: [] };
    const pairs = [];
    for (const line of lines) {
      const column = model.column(model.run(line), this.state.step);
      if (column < 0) continue;
      pairs.push([line, column, 0]);
      if (lines.length <= 4 * CROWDED) {
        const end = column + 1;
        const [xs, ys] = [model.path("delta_direction", line), model.path(measure, line)];
        const path = thinned(xs.subarray(0, end), ys.subarray(0, end), 60);
        paths.xs.push(path[0]);
        paths.ys.push(path[1]);
        paths.colour.push(this.colour(line));
      }
    }
    this.source(panel, "paths").data = paths;
    this.points(
      panel,
      pairs,
      (line, column) => model.value("delta_direction", line, column),
      (line, column) => model.value(measure, line, column),
      () => "circle",
    );
    this.hold(panel, "delta_direction", measure);
  }

  // Axes that stay where they are while the points move: the extent over all steps.
  hold(panel, horizontal, vertical) {
    const key = [panel.id, this.role(panel), horizontal, vertical].join();
    if (this.limits.get(panel.id) === key) return;
    this.limits.set(panel.id, key);
    const lines = this.model.select(panel.method, this.role(panel));
    const plot = this.plot(panel);
    for (const [range, measure] of [[plot.x_range, horizontal], [plot.y_range, vertical]]) {
      if (measure === null) continue;
      const ends = lines.map((line) => extent(this.model.path(measure, line)));
      const found = extent(ends.filter(Boolean).flat()) ?? [0, 1];
      const [low, high] = measure === "unit_coupling" ? [-1, 1] : found;
      const margin = 0.06 * (high - low || Math.abs(high) || 1);
      range.setv({ start: low - margin, end: high + margin });
      range.setv({ reset_start: low - margin, reset_end: high + margin });
    }
  }

  trajectories(panel) {
    const { model } = this;
    const measure = this.state.measure;
    const data = {
      xs: [], ys: [], colour: [], site: [], run: [], layer: [], series: [], dash: [],
    };
    const ring = { xs: [], ys: [] };
    for (const line of this.lines(panel)) {
      const run = model.run(line);
      const [xs, ys] = thinned(run.steps, model.path(measure, line));
      data.xs.push(xs);
      data.ys.push(ys);
      data.colour.push(this.colour(line));
      data.site.push(model.site(line));
      data.run.push(run.name);
      data.layer.push(model.rows[model.lines.row[line]]);
      data.series.push(line);
      data.dash.push("solid");
      if (model.lines.site[line] === this.state.site) {
        ring.xs.push(xs);
        ring.ys.push(ys);
      }
    }
    this.source(panel, "lines").data = data;
    this.source(panel, "ring").data = ring;
    this.moveCursor(panel, this.state.step);
  }

  moveCursor(panel, place) {
    for (const span of this.plot(panel).center) {
      if (span.tags.includes("now")) span.location = place;
    }
  }

  // Mean of a measure over the lines of each row (a layer) at each step of a method.
  // A cell with a value that is not finite is empty: no mean is taken over it.
  grid(panel, measure) {
    const { model } = this;
    const lines = model.select(panel.method, this.role(panel));
    const rows = [...new Set(lines.map((line) => model.lines.row[line]))].sort((a, b) => a - b);
    const place = new Map(rows.map((row, number) => [row, number]));
    const runs = new Set(lines.map((line) => model.runOf[line]));
    const steps = [
      ...new Set([...runs].flatMap((run) => [...model.runs[run].steps])),
    ].sort((a, b) => a - b);
    const values = new Float32Array(rows.length * steps.length);
    const counts = new Int32Array(rows.length * steps.length);
    for (const line of lines) {
      const run = model.run(line);
      const path = model.path(measure, line);
      const row = place.get(model.lines.row[line]) * steps.length;
      for (let i = 0; i < steps.length; i++) {
        const column = model.column(run, steps[i]);
        if (column < 0 || steps[i] > run.steps[run.steps.length - 1]) continue;
        values[row + i] += path[column];
        counts[row + i]++;
      }
    }
    for (let i = 0; i < values.length; i++) values[i] = counts[i] ? values[i] / counts[i] : NaN;
    return { rows, steps, values, counts };
  }

  heat(panel) {
    const measure = panel.measure === "delta_magnitude" ? this.state.magnitude : panel.measure;
    const grid = this.grid(panel, measure);
    panel.grid = grid;
    this.image(panel, grid.values, grid.rows.length, grid.steps.length);
    this.label(this.plot(panel).below[0], grid.steps.map((step) => step.toLocaleString("en")));
    this.label(this.plot(panel).left[0], grid.rows.map((row) => this.model.rows[row]));
    this.moveHeatCursor(panel);
  }

  moveHeatCursor(panel) {
    if (!panel.grid) return;
    const after = panel.grid.steps.findIndex((step) => step > this.state.step);
    this.moveCursor(panel, (after < 0 ? panel.grid.steps.length : after) - 1);
  }

  heads(panel) {
    const { model } = this;
    const lines = model.select(
      panel.method, this.role(panel), (line) => model.lines.head[line] >= 0,
    );
    const rows = [...new Set(lines.map((line) => model.lines.row[line]))].sort((a, b) => a - b);
    const place = new Map(rows.map((row, number) => [row, number]));
    const heads = lines.reduce((most, line) => Math.max(most, model.lines.head[line] + 1), 0);
    const values = new Float32Array(rows.length * heads);
    const counts = new Int32Array(rows.length * heads);
    for (const line of lines) {
      const column = model.column(model.run(line), this.state.step);
      if (column < 0) continue;
      const cell = place.get(model.lines.row[line]) * heads + model.lines.head[line];
      values[cell] += model.value(this.state.headMeasure, line, column);
      counts[cell]++;
    }
    for (let i = 0; i < values.length; i++) values[i] = counts[i] ? values[i] / counts[i] : NaN;
    const steps = Array.from({ length: heads }, (_, head) => head);
    panel.grid = { rows, steps, values, counts };
    this.image(panel, values, rows.length, heads);
    this.label(this.plot(panel).below[0], steps.map(String));
    this.label(this.plot(panel).left[0], rows.map((row) => model.rows[row]));
  }

  image(panel, values, rows, columns) {
    const plot = this.plot(panel);
    const { ndarray } = Bokeh.require("core/util/ndarray");
    const source = this.source(panel, "image");
    if (values.length === 0) {
      source.data = { image: [], x: [], y: [], dw: [], dh: [] };
      return;
    }
    source.data = {
      image: [ndarray(values, { dtype: "float32", shape: [rows, columns] })],
      x: [-0.5], y: [-0.5], dw: [columns], dh: [rows],
    };
    plot.x_range.setv({ start: -0.5, end: columns - 0.5 });
    plot.y_range.setv({ start: rows - 0.5, end: -0.5 });
    const [low, high] = extent(values) ?? [0, 1];
    const mapper = plot.right[0].color_mapper;
    mapper.setv({ low, high: high > low ? high : low + (Math.abs(low) || 1) });
  }

  // Names at whole numbers of an axis. A name is never taken for TeX, which `$$` would begin.
  label(axis, names) {
    const every = Math.max(1, Math.ceil(names.length / 6));
    const ticks = names.map((_, number) => number).filter((number) => number % every === 0);
    const labels = new Map(ticks.map((tick) => [tick, names[tick].replaceAll("$", "＄")]));
    axis.ticker = new (Bokeh.Models.get("FixedTicker"))({ ticks });
    axis.major_label_overrides = labels;
  }

  by_layer(panel) {
    const { model } = this;
    const pairs = this.lines(panel)
      .map((line) => [line, model.column(model.run(line), this.state.step), 0])
      .filter(([, column]) => column >= 0);
    this.points(
      panel,
      pairs,
      (line) => model.lines.row[line],
      (line, column) => model.value(this.state.unitMeasure, line, column),
      () => "circle",
    );
    this.hold(panel, null, this.state.unitMeasure);
    const rows = [...new Set(pairs.map(([line]) => model.lines.row[line]))];
    const plot = this.plot(panel);
    const [low, high] = extent(rows) ?? [0, 1];
    plot.x_range.setv({ start: low - 0.5, end: high + 0.5 });
    this.label(plot.below[0], model.rows);
  }

  cloud(panel) {
    const { units } = this.model;
    const snapshot = units.snapshots[this.state.snapshot];
    const site = snapshot.sites[this.state.unitSite];
    for (const place of document.querySelectorAll(".cloud-now")) {
      place.textContent = `${snapshot.run}, step ${snapshot.step}: ${site.site}`;
    }
    const end = site.begin + site.count;
    const change = units.data.changed.slice(site.begin, end);
    const many = (value) => Array(site.count).fill(value);
    this.source(panel, "points").data = {
      x: units.data.turned.slice(site.begin, end),
      y: change.map(Math.abs),
      change,
      colour: many(this.state.dark ? "#3D9BD6" : "#0072B2"),
      marker: Array.from(change, (value) => (value < 0 ? "inverted_triangle" : "circle")),
      size: many(Math.max(5, 9 * Math.min(1, Math.sqrt(CROWDED / site.count)))),
      site: many(site.site), run: many(""), layer: many(""), step: many(0),
      r: many(NaN), slope: many(NaN), series: many(-1),
    };
  }
}
