// How numbers, times and sizes are written.

export const NONE = "–";

const plain = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function number(value) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return size >= 1e4 ? whole.format(value) : plain.format(value);
}

/** A value with always as many digits, so that it does not jump when it changes. */
export function steady(value, digits = 3) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(digits - 1) : value.toFixed(digits);
}

export function count(value) {
  return value === null || value === undefined ? NONE : whole.format(value);
}

export function rate(value) {
  if (value === null || value === undefined) return NONE;
  return value >= 100 ? whole.format(value) : value.toFixed(value >= 10 ? 1 : 2);
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds === 0) return "0 s";
  if (seconds < 0.01) return `${(seconds * 1e3).toFixed(1)} ms`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(0)} ms`;
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 90 * 60) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 48 * 3600 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} d`;
}

export function ago(at, now) {
  if (at === null || at === undefined) return NONE;
  const seconds = Math.max(0, now - at);
  return seconds < 3 ? "now" : `${duration(Math.floor(seconds)).replace(/\.0 s$/, " s")} ago`;
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = value, unit = 0;
  while (size >= 1000 && unit < units.length - 1) [size, unit] = [size / 1000, unit + 1];
  return `${size >= 100 ? size.toFixed(0) : Number(size.toPrecision(3))} ${units[unit]}`;
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

/** `SCALED_TO_ZERO` as words. */
export function words(status) {
  return status.toLowerCase().replaceAll("_", " ");
}
