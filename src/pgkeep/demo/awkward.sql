-- A database that is awkward on purpose, for PostgreSQL 15 and later, run by a superuser in one transaction.
-- The setting awkward.rows says how many rows the largest table gets.
-- Nothing in here is random: two runs make the same database, large objects' numbers apart.

-- Roles belong to the server, not to the database, and may be there already. -------------------------------
DO $roles$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['awkward_reader', 'awkward Owner "x"'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = wanted) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
        END IF;
    END LOOP;
END
$roles$;

CREATE SCHEMA shop;
CREATE SCHEMA "Reporting";
CREATE SCHEMA "odd schema";
CREATE SCHEMA "a.b ""c""" AUTHORIZATION "awkward Owner ""x""";
COMMENT ON SCHEMA shop IS E'It''s a shop;\n-- Name: not_a_table; Type: TABLE; Schema: shop; Owner: nobody\n\\.';
GRANT USAGE ON SCHEMA shop, "Reporting" TO awkward_reader;
ALTER DEFAULT PRIVILEGES IN SCHEMA "Reporting" GRANT SELECT ON TABLES TO awkward_reader;
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;

-- Types ------------------------------------------------------------------------------------------------------
CREATE TYPE shop.mood AS ENUM ('sad', 'it''s ok', 'très content', 'a\b', '🙂');
CREATE DOMAIN shop.email AS text CHECK (VALUE ~ '^[^@]+@[^@]+$');
CREATE DOMAIN shop.positive AS integer NOT NULL DEFAULT 1 CONSTRAINT "above zero" CHECK (VALUE > 0);
CREATE TYPE shop.address AS (street text, "Post Code" text, lines text[]);
CREATE TYPE shop.float_range AS RANGE (subtype = float8, subtype_diff = float8mi);
CREATE COLLATION shop.plain (provider = libc, locale = 'C');

-- Functions whose bodies look like parts of a dump ------------------------------------------------------------
CREATE FUNCTION shop.looks_like_a_dump(integer) RETURNS text LANGUAGE plpgsql AS $body$
BEGIN
    /* None of the following lines is what it looks like.
--
-- Data for Name: customers; Type: TABLE DATA; Schema: shop; Owner: postgres
--

COPY public.x FROM stdin;
1	one
\.

\restrict abcdef
\connect postgres
\unrestrict abcdef
SELECT pg_catalog.setval('shop.customers_id_seq', 999999, true);
-- PostgreSQL database dump complete
-- pgkeep-index 1
    */
    RETURN $_$quoted once$_$ || $q$

COPY shop.customers (id, name) FROM stdin;
\.
$q$ || E'\\.\n' || $1;
END
$body$;
CREATE FUNCTION shop.add(a integer, b integer DEFAULT 1) RETURNS integer LANGUAGE sql IMMUTABLE STRICT
    BEGIN ATOMIC SELECT a + b; END;
CREATE FUNCTION shop.shout(text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT upper($1) || ''!''';
CREATE PROCEDURE shop."Do Nothing"() LANGUAGE plpgsql SET search_path = shop, pg_temp AS 'BEGIN NULL; END';
CREATE AGGREGATE shop.total(integer) (SFUNC = int4pl, STYPE = integer, INITCOND = '0');
CREATE OPERATOR shop.|+| (LEFTARG = integer, RIGHTARG = integer, FUNCTION = shop.add);
GRANT EXECUTE ON FUNCTION shop.shout(text) TO awkward_reader;
COMMENT ON FUNCTION shop.shout(text) IS $$COPY public.y FROM stdin;
\.
$$;

-- Foreign keys: plain, to itself, in a circle, composite; identity and serial --------------------------------
CREATE TABLE shop.customers (
    id bigint GENERATED ALWAYS AS IDENTITY (START WITH 1000 INCREMENT BY 7) PRIMARY KEY,
    name text NOT NULL,
    email shop.email UNIQUE,
    feeling shop.mood DEFAULT 'it''s ok',
    home shop.address,
    referred_by bigint REFERENCES shop.customers ON DELETE SET NULL,
    favourite integer,
    shouted text GENERATED ALWAYS AS (upper(name) || '!') STORED,
    joined timestamptz NOT NULL DEFAULT '2024-02-29 12:00:00+00'
);
CREATE TABLE shop.products (
    id serial PRIMARY KEY,
    sku text COLLATE shop.plain NOT NULL,
    price numeric(12, 2) NOT NULL CHECK (price >= 0),
    stock shop.positive,
    best_customer bigint REFERENCES shop.customers DEFERRABLE INITIALLY DEFERRED,
    UNIQUE NULLS NOT DISTINCT (sku, best_customer)
);
ALTER TABLE shop.customers ADD CONSTRAINT "fav→product" FOREIGN KEY (favourite) REFERENCES shop.products
    DEFERRABLE INITIALLY DEFERRED;

INSERT INTO shop.customers (name, email, feeling, home)
SELECT 'Customer ' || n, 'c' || n || '@example.org', (enum_range(NULL::shop.mood))[n % 5 + 1],
       CASE WHEN n % 3 > 0 THEN ROW('Street "' || n || '"', '', ARRAY['a,b', NULL, E'tab\there', ''])::shop.address END
FROM generate_series(1, greatest(current_setting('awkward.rows')::integer / 100, 10)) AS n;
UPDATE shop.customers SET referred_by = id - 7 WHERE id > 1000 AND id % 2 = 0;
INSERT INTO shop.products (sku, price, stock, best_customer)
SELECT 'SKU-' || n, n * 0.37, n, 1000 + 7 * (n % 10) FROM generate_series(1, 500) AS n;
UPDATE shop.customers SET favourite = 1 + id % 500;
SET CONSTRAINTS ALL IMMEDIATE;
ALTER TABLE shop.products ADD CONSTRAINT cheap CHECK (price < 100) NOT VALID;
ALTER SEQUENCE shop.products_id_seq INCREMENT BY 5 CACHE 3;
SELECT setval('shop.products_id_seq', 123456789, false);

CREATE SEQUENCE shop."countdown" AS smallint INCREMENT BY -1 MAXVALUE 100 MINVALUE -5 START WITH 100 CYCLE;
SELECT nextval('shop.countdown'), nextval('shop.countdown');
CREATE SEQUENCE "odd schema"."never used" START WITH 42;
GRANT USAGE, SELECT ON SEQUENCE shop.countdown TO awkward_reader;

-- The large one -----------------------------------------------------------------------------------------------
CREATE TABLE shop.events (
    id bigint GENERATED BY DEFAULT AS IDENTITY,
    customer bigint NOT NULL,
    at timestamptz NOT NULL,
    kind text NOT NULL,
    payload text,
    details jsonb,
    amount double precision
);
INSERT INTO shop.events (customer, at, kind, payload, details, amount)
SELECT 1000 + 7 * (n % 10), timestamptz '2025-01-01 00:00:00+00' + n * interval '37 seconds',
       (ARRAY['view', 'buy', 'return', 'Größe'])[n % 4 + 1],
       CASE n % 7 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN E'two\nlines\tand a tab\\' ELSE md5(n::text) END,
       CASE WHEN n % 5 = 0 THEN jsonb_build_object('n', n, 'tags', ARRAY['a', 'b']) END,
       sqrt(n)
FROM generate_series(1, current_setting('awkward.rows')::integer) AS n;
ALTER TABLE shop.events ADD PRIMARY KEY (id) INCLUDE (kind);
ALTER TABLE shop.events ADD FOREIGN KEY (customer) REFERENCES shop.customers NOT VALID;
CREATE INDEX events_lower_kind ON shop.events (lower(kind)) WHERE payload IS NOT NULL;
CREATE INDEX events_at ON shop.events USING brin (at);
CREATE INDEX events_payload ON shop.events USING hash (payload) WHERE kind = 'buy';
CREATE INDEX events_details ON shop.events USING gin (details jsonb_path_ops) WHERE details IS NOT NULL;
ALTER INDEX shop.events_lower_kind ALTER COLUMN 1 SET STATISTICS 500;
CREATE STATISTICS shop.events_together (ndistinct, dependencies, mcv) ON kind, customer FROM shop.events;
COMMENT ON TABLE shop.events IS 'The large table';
COMMENT ON COLUMN shop.events.payload IS E'Null, empty, \\N, or\ttext';
COMMENT ON INDEX shop.events_at IS 'small';

-- A row larger than 16 MiB: half text that hardly shrinks, half text that does --------------------------------
CREATE TABLE shop.documents (id integer PRIMARY KEY, body text, raw bytea);
ALTER TABLE shop.documents ALTER COLUMN body SET STORAGE EXTERNAL, ALTER COLUMN raw SET STORAGE EXTERNAL;
INSERT INTO shop.documents VALUES (0, '', ''), (2, NULL, NULL), (3, 'small', '\x00ff0a5c2e0d');
INSERT INTO shop.documents (id, body, raw)
SELECT 1, repeat(hardly, 2) || repeat(E'zeile\\ü', 1300000), decode(substr(replace(hardly, E'\n', ''), 1, 3200000), 'hex')
FROM (SELECT string_agg(md5(n::text), CASE WHEN n % 64 = 0 THEN E'\n' ELSE '' END) AS hardly
      FROM generate_series(1, 150000) AS n) AS text_of_digits;

-- Partitions: by range, below that by list; a default; by hash; one that was attached with other column order --
CREATE TABLE shop.measurements (
    day date NOT NULL, region text NOT NULL, value numeric, sensor integer NOT NULL, PRIMARY KEY (day, region, sensor)
) PARTITION BY RANGE (day);
CREATE TABLE shop.measurements_2024 PARTITION OF shop.measurements FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE TABLE shop.measurements_2025 PARTITION OF shop.measurements FOR VALUES FROM ('2025-01-01') TO ('2026-01-01')
    PARTITION BY LIST (region);
CREATE TABLE "odd schema"."measurements 2025 north" PARTITION OF shop.measurements_2025 FOR VALUES IN ('north', 'île');
CREATE TABLE shop.measurements_2025_rest PARTITION OF shop.measurements_2025 DEFAULT;
CREATE TABLE shop.measurements_rest PARTITION OF shop.measurements DEFAULT;
CREATE TABLE shop.measurements_2023 (
    sensor integer NOT NULL, gone text, value numeric DEFAULT 7, region text NOT NULL, day date NOT NULL
);
ALTER TABLE shop.measurements_2023 DROP COLUMN gone;
ALTER TABLE shop.measurements ATTACH PARTITION shop.measurements_2023 FOR VALUES FROM ('2023-01-01') TO ('2024-01-01');
CREATE INDEX ON shop.measurements (value);
INSERT INTO shop.measurements (day, region, value, sensor)
SELECT date '2022-12-01' + n % 1300, (ARRAY['north', 'south', 'île', ''])[n % 4 + 1], n / 7.0, n
FROM generate_series(1, greatest(current_setting('awkward.rows')::integer / 20, 2000)) AS n;
CREATE TABLE shop.calibrations (
    day date, region text, sensor integer, note text, FOREIGN KEY (day, region, sensor) REFERENCES shop.measurements
);
INSERT INTO shop.calibrations SELECT day, region, sensor, 'ok' FROM shop.measurements ORDER BY sensor LIMIT 50;
CREATE TABLE shop.hashed (key integer, value text) PARTITION BY HASH (key);
CREATE TABLE shop.hashed_0 PARTITION OF shop.hashed FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE shop.hashed_1 PARTITION OF shop.hashed FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO shop.hashed SELECT n, 'value ' || n FROM generate_series(1, 1000) AS n;

-- Inheritance, and a child whose columns are in another order -------------------------------------------------
CREATE TABLE shop.vehicles (id integer CONSTRAINT real_id CHECK (id > 0), name text DEFAULT 'unnamed', wheels integer);
CREATE TABLE shop.cars (doors integer, CHECK (doors < 9)) INHERITS (shop.vehicles);
CREATE TABLE shop.amphibious (depth numeric, wheels integer, id integer CONSTRAINT real_id CHECK (id > 0), name text);
ALTER TABLE shop.amphibious INHERIT shop.vehicles;
INSERT INTO shop.vehicles VALUES (1, 'Fahrrad', 2), (2, DEFAULT, NULL);
INSERT INTO shop.cars VALUES (3, 'car', 4, 5), (4, 'door''s', 3, 0);
INSERT INTO shop.amphibious VALUES (1.5, 4, 5, 'swims');

-- Dropped columns, no columns, no rows, not logged ------------------------------------------------------------
CREATE TABLE shop.shrunk (a integer, b text DEFAULT 'b', c integer, d text);
INSERT INTO shop.shrunk SELECT n, 'gone', n * 2, 'kept ' || n FROM generate_series(1, 20) AS n;
ALTER TABLE shop.shrunk DROP COLUMN b;
ALTER TABLE shop.shrunk ADD COLUMN b date DEFAULT '2025-05-05';
CREATE TABLE "no columns" ();
INSERT INTO "no columns" DEFAULT VALUES;
INSERT INTO "no columns" DEFAULT VALUES;
INSERT INTO "no columns" DEFAULT VALUES;
CREATE TABLE shop.empty (id integer PRIMARY KEY, nothing text);
CREATE UNLOGGED TABLE shop.cache (key text PRIMARY KEY, value jsonb);
INSERT INTO shop.cache SELECT 'k' || n, to_jsonb(n) FROM generate_series(1, 100) AS n;

-- Names ---------------------------------------------------------------------------------------------------------
CREATE TABLE "select" ("order" integer, "from" text, "Mixed Case" boolean, "percent%s %" text, "null" text);
INSERT INTO "select" VALUES (1, 'x', true, '%s', 'null'), (NULL, 'NULL', NULL, NULL, NULL);
CREATE TABLE "odd schema"."Tab.le with ""quotes"", it's; \ and --" ("a""b" integer, "c\d" text, "e.f" text, "g
h" text, "ключ 🔑" text);
INSERT INTO "odd schema"."Tab.le with ""quotes"", it's; \ and --" VALUES (1, 'c', 'e', 'g', '🔑');
CREATE TABLE "odd schema"."line
break
COPY public.x FROM stdin;
\." (v text);
INSERT INTO "odd schema"."line
break
COPY public.x FROM stdin;
\." VALUES ('one'), ('two');
CREATE TABLE "a.b ""c"""."d.e" ("f.g" text PRIMARY KEY);
INSERT INTO "a.b ""c"""."d.e" VALUES ('h.i');
ALTER TABLE "a.b ""c"""."d.e" OWNER TO "awkward Owner ""x""";
CREATE TABLE "a.b ""c"""."sixty-three bytes of a name, the longest there is: ÄÖÜß 日" (x integer);

-- Values --------------------------------------------------------------------------------------------------------
CREATE TABLE shop."hostile text" (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);
INSERT INTO shop."hostile text" (v) VALUES
    (NULL), (''), (' '), ('\N'), ('\.'), ('\\.'), ('\'), ('\\N'), (E'\\.\n'), (E'\n\\.\n'), (E'x\n\\.\ny'), (E'\n'),
    (E'\r'), (E'\r\n'), (E'\t'), (E'a\tb'), (E'\b\f\x0b'), (E'\x01\x1b[31m\x7f'), (E'\x1c\x1d\x1e\u0085\u2028\u2029'),
    ('null'), ('NULL'), ('"'), (''''), ('$$'), ('$body$'), ('-- comment'), ('/* open'), (';'), ('{}'), ('a,b'),
    ('COPY public.x FROM stdin;'), ('-- Data for Name: x; Type: TABLE DATA; Schema: public; Owner: postgres'),
    ('\restrict abc'), ('\unrestrict abc'), ('\connect postgres'), ('\! true'), (E'\\.\n\\connect postgres\n'),
    (U&'\FEFFmark'), ('naïve façade'), ('Zażółć gęślą jaźń'), ('日本語テキスト'), ('שלום עולם'), ('🐘👩‍👩‍👧'), (U&'e\0301'),
    (repeat('\', 70000)), (repeat(E'\n', 70000)), (repeat('🐘', 70000)), ('x');
CREATE TABLE shop."hostile alone" (v text);
INSERT INTO shop."hostile alone" SELECT v FROM shop."hostile text" ORDER BY id;

CREATE TABLE shop.kinds (
    id integer PRIMARY KEY,
    matrix integer[][], words text[], addresses shop.address[], moods shop.mood[],
    document jsonb, verbatim json, bytes bytea, during tstzrange, numbers int4multirange, floats shop.float_range,
    f4 real, f8 double precision, n numeric, d date, t timestamptz, i interval, u uuid, net inet, bits bit varying,
    search tsvector, p point, one "char", kept boolean
);
INSERT INTO shop.kinds VALUES
    (1, '{{1,2},{3,NULL}}', ARRAY['a,b', '"', '\', NULL, 'NULL', '', E'\n', '{}', ' '],
     ARRAY[ROW('s', NULL, '{}')::shop.address, NULL], '{sad,"it''s ok","a\\b"}',
     '{"a": [1, 2.50, null, "\u00e9\n\"\\"], "": {"b": false}}', '{"k":1,  "k":2}', '\x00010aff5c2e', '[2025-01-01,)',
     '{[1,3),[5,8)}', '[0.1,1e300)', 'NaN', '-Infinity', 'NaN', 'infinity', '-infinity', '1 mon -2 days 03:04:05.678901',
     '00112233-4455-6677-8899-aabbccddeeff', '2001:db8::/32', B'0101', 'a:1A fat:2B,4C', '(1.5,-0)', 'x', true),
    (2, '[0:1]={7,8}', '{}', '{}', '{}', 'null', 'null', '', 'empty', '{}', 'empty', '-0', 0.1,
     '123456789012345678901234567890.00012345', '4713-01-01 BC', '0044-03-15 12:00:00+00 BC', '-00:00:00.000001',
     NULL, '10.0.0.1/8', B'', '', NULL, '', false),
    (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1e-45, 1.7976931348623157e308, 'Infinity', NULL,
     '294276-12-31 23:59:59.999999+00', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);

CREATE TABLE shop.bookings (room integer, during tstzrange, EXCLUDE USING gist (during WITH &&) WHERE (room = 1));
INSERT INTO shop.bookings SELECT 1, tstzrange(t, t + interval '1 hour')
FROM generate_series(timestamptz '2025-01-01 00:00+00', '2025-01-05 00:00+00', interval '1 hour') AS t;

-- Views, materialised views, triggers, rules, policies --------------------------------------------------------
CREATE VIEW "Reporting"."per customer" AS  -- its GROUP BY needs the primary key, so a dump must split it
    SELECT c.id, c.name, count(p.id) AS products FROM shop.customers c LEFT JOIN shop.products p ON p.best_customer = c.id
    GROUP BY c.id;
CREATE VIEW shop.cheap WITH (security_barrier) AS SELECT * FROM shop.products WHERE price < 10 WITH LOCAL CHECK OPTION;
CREATE RECURSIVE VIEW "Reporting".chain (id, depth) AS
    SELECT id, 1 FROM shop.customers WHERE referred_by IS NULL
    UNION ALL SELECT c.id, chain.depth + 1 FROM shop.customers c JOIN chain ON c.referred_by = chain.id;
CREATE MATERIALIZED VIEW "Reporting".by_kind AS
    SELECT kind, count(*) AS events, sum(amount)::numeric(20, 3) AS amount FROM shop.events GROUP BY kind;
CREATE UNIQUE INDEX ON "Reporting".by_kind (kind);
CREATE MATERIALIZED VIEW "Reporting"."of another" AS SELECT max(events) AS most FROM "Reporting".by_kind;
CREATE MATERIALIZED VIEW "Reporting".not_yet AS SELECT * FROM shop.customers WITH NO DATA;
GRANT SELECT (id, name), UPDATE (name) ON shop.customers TO awkward_reader;
GRANT SELECT ON "Reporting"."per customer" TO awkward_reader WITH GRANT OPTION;
GRANT INSERT, SELECT ON "select" TO PUBLIC;

CREATE TABLE shop.log (id serial, at timestamptz DEFAULT '2025-01-01 00:00+00', what text);
CREATE FUNCTION shop.refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$BEGIN RAISE EXCEPTION 'a trigger fired that had no business to'; END$$;
CREATE FUNCTION shop.note() RETURNS trigger LANGUAGE plpgsql AS
    $$BEGIN INSERT INTO shop.log (what) VALUES (TG_OP || ' ' || TG_TABLE_NAME); RETURN NEW; END$$;
INSERT INTO shop.log (what) VALUES ('before the triggers');
CREATE TRIGGER refuse BEFORE INSERT OR DELETE ON shop.kinds FOR EACH ROW EXECUTE FUNCTION shop.refuse();
CREATE TRIGGER "note it" AFTER UPDATE OF name ON shop.customers FOR EACH ROW WHEN (OLD.name <> NEW.name)
    EXECUTE FUNCTION shop.note();
CREATE TRIGGER dormant BEFORE INSERT ON shop.products FOR EACH ROW EXECUTE FUNCTION shop.refuse();
ALTER TABLE shop.products DISABLE TRIGGER dormant;
CREATE TRIGGER on_partitions AFTER INSERT ON shop.measurements FOR EACH ROW EXECUTE FUNCTION shop.note();
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON shop.bookings DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    EXECUTE FUNCTION shop.note();
CREATE RULE also AS ON INSERT TO shop.cache DO ALSO INSERT INTO shop.log (what) VALUES ('cached ' || NEW.key);
CREATE RULE quiet AS ON DELETE TO shop.documents DO INSTEAD NOTHING;
COMMENT ON TRIGGER "note it" ON shop.customers IS 'rings a bell';

ALTER TABLE shop.calibrations ENABLE ROW LEVEL SECURITY;
ALTER TABLE shop.calibrations FORCE ROW LEVEL SECURITY;
CREATE POLICY "only ok" ON shop.calibrations FOR SELECT TO awkward_reader USING (note = 'ok');
ALTER TABLE shop.cache REPLICA IDENTITY USING INDEX cache_pkey;
ALTER TABLE shop.events CLUSTER ON events_pkey;
ALTER TABLE shop.empty SET (fillfactor = 70, autovacuum_enabled = false);

CREATE FOREIGN DATA WRAPPER nowhere;
CREATE SERVER "far away" FOREIGN DATA WRAPPER nowhere OPTIONS (host 'h', "odd option" 'it''s');
CREATE FOREIGN TABLE shop.elsewhere (id integer OPTIONS (key 'true'), v text) SERVER "far away";
CREATE TEXT SEARCH CONFIGURATION shop.simplest (COPY = pg_catalog.simple);
CREATE FUNCTION shop.watch() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN NULL; END';
CREATE EVENT TRIGGER watch_ddl ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION shop.watch();

-- Large objects: empty, small, larger than a MiB, with a hole; one with owner, rights and comment --------------
CREATE TABLE shop.attachments (name text PRIMARY KEY, content oid);
INSERT INTO shop.attachments VALUES
    ('empty', lo_create(0)),
    ('text', lo_from_bytea(0, convert_to(E'\\.\nCOPY public.x FROM stdin;\n-- \n', 'UTF8'))),
    ('one page', lo_from_bytea(0, convert_to(repeat('p', 2048), 'UTF8'))),
    ('binary', lo_from_bytea(0, (SELECT decode(string_agg(md5('lo' || n), '' ORDER BY n), 'hex')
                                 FROM generate_series(1, 98304) AS n))),
    ('hole', lo_create(0));
SELECT lo_put(content, 300000, '\x00ff'::bytea) FROM shop.attachments WHERE name = 'hole';
DO $large$
DECLARE
    number oid := (SELECT content FROM shop.attachments WHERE name = 'binary');
BEGIN
    EXECUTE format('ALTER LARGE OBJECT %s OWNER TO "awkward Owner ""x"""', number);
    EXECUTE format('GRANT SELECT ON LARGE OBJECT %s TO awkward_reader', number);
    EXECUTE format('COMMENT ON LARGE OBJECT %s IS %L', number, E'1.5 MiB;\n\\.\nwith a comment');
END
$large$;
