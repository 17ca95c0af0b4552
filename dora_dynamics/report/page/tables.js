// The tables beside the charts: the same numbers in words, for readers who do not see a chart.

const MOST_COLUMNS = 8;
const MOST_ROWS = 4000;

class Tables {
  constructor(model, state, charts, panels) {
    Object.assign(this, { model, state, charts, panels });
  }

  // The shown panels of some kinds, and all their lines.
  lines(kind) {
    const own = this.panels.filter(
      (panel) => panel.kind === kind && !this.state.hiddenMethods.has(panel.method),
    );
    const seen = new Set();
    return own
      .flatMap((panel) => this.charts.lines(panel))
      .filter((line) => !seen.has(line) && seen.add(line));
  }

  place(line) {
    const { model } = this;
    const run = model.run(line);
    return [
      model.methods[run.method], run.name, model.site(line),
      model.roles[model.lines.role[line]], model.rows[model.lines.row[line]],
    ];
  }

  at(line, column, measures) {
    return [
      this.model.run(line).steps[column].toLocaleString("en"),
      ...measures.map((measure) => shown(this.model.value(measure, line, column))),
    ];
  }

  heading(measures) {
    const titles = measures.map((measure) => this.model.measures[measure].title);
    return ["method", "run", "weight", "role", "layer", "step", ...titles];
  }

  now(kind, measures) {
    const rows = [];
    for (const line of this.lines(kind)) {
      const column = this.model.column(this.model.run(line), this.state.step);
      if (column >= 0) rows.push([...this.place(line), ...this.at(line, column, measures)]);
    }
    return [this.heading(measures), rows];
  }

  paper() {
    const measures = ["delta_direction", "delta_magnitude"];
    const rows = this.lines("paper").flatMap((line) =>
      this.model.run(line).checkpoints.map((column) => [
        ...this.place(line), ...this.at(line, column, measures),
      ]),
    );
    return [this.heading(measures), rows];
  }

  steps() {
    return this.now("steps", [
      "delta_direction", "delta_magnitude", "signed_delta_magnitude", "relative_delta_magnitude",
    ]);
  }

  by_layer() {
    return this.now("by_layer", ["unit_coupling", "unit_slope"]);
  }

  heads() {
    const lines = this.lines("heads").filter((line) => this.model.lines.head[line] >= 0);
    const measures = ["delta_magnitude", "delta_direction", "unit_coupling"];
    const rows = lines.map((line) => {
      const column = this.model.column(this.model.run(line), this.state.step);
      return column < 0 ? null : [...this.place(line), ...this.at(line, column, measures)];
    });
    return [this.heading(measures), rows.filter(Boolean)];
  }

  trajectories() {
    const { model } = this;
    const steps = spread(model.steps);
    const rows = this.lines("trajectories").map((line) => {
      const run = model.run(line);
      const last = run.steps[run.steps.length - 1];
      const values = steps.map((step) =>
        step > last ? "–" : shown(model.value(this.state.measure, line, model.column(run, step))),
      );
      return [...this.place(line), ...values];
    });
    const title = model.measures[this.state.measure].title;
    const at = steps.map((step) => `${title} at ${step.toLocaleString("en")}`);
    return [["method", "run", "weight", "role", "layer", ...at], rows];
  }

  heat() {
    const { model } = this;
    const steps = spread(model.steps);
    const own = this.panels.filter(
      (panel) => panel.kind === "heat" && !this.state.hiddenMethods.has(panel.method),
    );
    const rows = own.flatMap((panel) => {
      const { grid } = panel;
      if (!grid) return [];
      return grid.rows.map((row, number) => [
        model.methods[panel.method], model.roles[this.charts.role(panel)],
        panel.measure === "delta_direction" ? "ΔD" : model.measures[this.state.magnitude].title,
        model.rows[row],
        ...steps.map((step) => {
          const place = grid.steps.filter((recorded) => recorded <= step).length - 1;
          return place < 0 ? "–" : shown(grid.values[number * grid.steps.length + place]);
        }),
      ]);
    });
    const at = steps.map((step) => `step ${step.toLocaleString("en")}`);
    return [["method", "role", "measure", "layer", ...at], rows];
  }

  cloud() {
    const { units } = this.model;
    const site = units.snapshots[this.state.snapshot].sites[this.state.unitSite];
    const rows = Array.from({ length: site.count }, (_, number) => {
      const place = site.begin + number;
      return [
        site.site, `${number + 1}`,
        shown(units.data.turned[place]), shown(units.data.changed[place], true),
      ];
    });
    return [["weight", "unit, as shown", "1 − cos", "m′ − m₀"], rows];
  }

  // Fill the tables that are open.
  draw(kinds) {
    for (const details of document.querySelectorAll("details[data-table]")) {
      const kind = details.dataset.table;
      if (details.open && kinds.includes(kind)) this.fill(details, kind);
    }
  }

  fill(details, kind) {
    const [heading, rows] = this[kind]();
    const table = document.createElement("table");
    const caption = table.createCaption();
    const left = rows.length - MOST_ROWS;
    caption.textContent =
      `${details.dataset.caption} ${rows.length.toLocaleString("en")} rows` +
      (left > 0 ? `, the first ${MOST_ROWS.toLocaleString("en")} are shown.` : ".");
    const head = table.createTHead().insertRow();
    for (const name of heading) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = name;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const values of rows.slice(0, MOST_ROWS)) {
      const row = body.insertRow();
      for (const value of values) row.insertCell().textContent = value;
    }
    details.querySelector(".scroll").replaceChildren(table);
  }
}

// At most MOST_COLUMNS of the steps after the first, evenly, the last among them.
function spread(steps) {
  const after = steps.length > 1 ? steps.slice(1) : steps;
  if (after.length <= MOST_COLUMNS) return after;
  return Array.from(
    { length: MOST_COLUMNS },
    (_, i) => after[Math.round(((i + 1) * after.length) / MOST_COLUMNS) - 1],
  );
}
