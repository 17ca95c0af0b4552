// The numbers of the page, and questions about them. Nothing here touches the document.

class Model {
  constructor(data) {
    Object.assign(this, data);
    let offset = 0;
    for (const run of this.runs) {
      run.offset = offset;
      offset += run.count * run.steps.length;
    }
    this.count = this.lines.site.length;
    this.runOf = new Int32Array(this.count);
    this.runs.forEach((run, number) => this.runOf.fill(number, run.first, run.first + run.count));
    this.steps = [...new Set(this.runs.flatMap((run) => [...run.steps]))].sort((a, b) => a - b);
  }

  // The lines of a method and a role, in order; of one role where `role` is given.
  select(method, role, keep = () => true) {
    const found = [];
    for (let line = 0; line < this.count; line++) {
      const own = this.runs[this.runOf[line]].method === method && this.lines.role[line] === role;
      if (own && keep(line)) found.push(line);
    }
    return found;
  }

  // Number of the last column of a run that is at or before a step; -1 where it begins later.
  column(run, step) {
    let low = 0;
    let high = run.steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (run.steps[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  value(measure, line, column) {
    const run = this.runs[this.runOf[line]];
    if (column < 0) return NaN;
    const place = run.offset + (line - run.first) * run.steps.length + column;
    return this.measures[measure].values[place];
  }

  path(measure, line) {
    const run = this.runs[this.runOf[line]];
    const start = run.offset + (line - run.first) * run.steps.length;
    return this.measures[measure].values.subarray(start, start + run.steps.length);
  }

  site(line) {
    const head = this.lines.head[line];
    const name = this.sites[this.lines.site[line]];
    return head < 0 ? name : `${name}, head ${head}`;
  }

  run(line) {
    return this.runs[this.runOf[line]];
  }
}

// Lowest and highest finite value, or null.
function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

// A path of at most 2·`buckets` points: the lowest and the highest of each stretch of steps.
function thinned(xs, ys, buckets = 120) {
  if (xs.length <= 2 * buckets) return [xs, ys];
  const x = [];
  const y = [];
  for (let bucket = 0; bucket < buckets; bucket++) {
    const start = Math.floor((bucket * xs.length) / buckets);
    const end = Math.floor(((bucket + 1) * xs.length) / buckets);
    let low = start;
    let high = start;
    for (let i = start; i < end; i++) {
      if (!(ys[i] >= ys[low])) low = i;
      if (!(ys[i] <= ys[high])) high = i;
    }
    for (const i of low < high ? [low, high] : [high, low]) {
      x.push(xs[i]);
      y.push(ys[i]);
    }
  }
  return [Float64Array.from(x), Float64Array.from(y)];
}

// A number as people read it: three significant digits, a true minus.
function shown(value, signed = false) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size >= 1e-3 && size < 1e5) text = size.toPrecision(3);
  else text = size.toExponential(2).replace("e-", "e−").replace("e+", "e");
  if (value < 0) return `−${text}`;
  return signed && value > 0 ? `+${text}` : text;
}
