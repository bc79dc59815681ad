// Ajv's verdict on messages: `node ajv.mjs SCHEMAS` reads lines of {"schema": NAME, "value": …}
// from stdin and prints one JSON list, with a line's number and each thing that is wrong in it.

import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import Ajv from 'ajv/dist/2020.js';
import addFormats from 'ajv-formats';

const folder = process.argv[2];
// strict: a keyword that Ajv does not know is an error, too.
const ajv = new Ajv({ allErrors: true, strict: true, allowUnionTypes: true });
addFormats(ajv);
for (const file of readdirSync(folder).filter((name) => name.endsWith('.json'))) {
  ajv.addSchema(JSON.parse(readFileSync(join(folder, file))), file.replace(/\.json$/, ''));
}

const problems = [];
let line = 0;
for await (const text of createInterface({ input: process.stdin })) {
  const { schema, value } = JSON.parse(text);
  const check = ajv.getSchema(schema);
  if (check === undefined) problems.push({ line, problem: `there is no schema ${schema}` });
  else if (!check(value)) {
    for (const { instancePath, message } of check.errors) {
      problems.push({ line, problem: `${instancePath || 'the message'} ${message}` });
    }
  }
  line += 1;
}
console.log(JSON.stringify(problems));
