# ruff: noqa: E501 - an expected column is one line, however many sources it has
"""What a reader of SQL should say, worked out by hand from the SQL and not from its output.

Of each case: the SQL, then one line per output column in order, `name  source.field:KINDS …`, with
`-` for a constant. KINDS are subtypes joined by `+`; none means IDENTITY, `*` after a subtype that
it is masked. `rows` are the dataset inputs in the same notation.
"""

from dataclasses import dataclass, field

SHOP = {
    "orders": "id customer_id status amount ordered_at",
    "customers": "id first_name last_name email",
    "payments": "id order_id method amount",
}


@dataclass(frozen=True)
class Case:
    name: str
    sql: str
    columns: str
    rows: str = ""
    dialect: str = "duckdb"
    relation: str = '"shop"."main"."{}"'
    sources: dict[str, str | None] = field(default_factory=lambda: dict(SHOP))
    added: tuple[str, ...] = ()
    partial: str | None = None  # what the message says
    columns_known: bool = True


CASES = [
    # The jaffle shop, as dbt compiles it.
    Case(
        "stg_customers",
        """
        with source as (
            select * from "shop"."main"."raw_customers"
        ),
        renamed as (
            select id as customer_id, first_name, last_name from source
        )
        select * from renamed
        """,
        """
        customer_id  raw_customers.id
        first_name   raw_customers.first_name
        last_name    raw_customers.last_name
        """,
        sources={"raw_customers": "id first_name last_name"},
    ),
    Case(
        "stg_payments",
        """
        with source as (select * from "shop"."main"."raw_payments"),
        renamed as (
            select id as payment_id, order_id, payment_method,
                -- `amount` is currently stored in cents, so we convert it to dollars
                amount / 100 as amount
            from source
        )
        select * from renamed
        """,
        """
        payment_id      raw_payments.id
        order_id        raw_payments.order_id
        payment_method  raw_payments.payment_method
        amount          raw_payments.amount:TRANSFORMATION
        """,
        sources={"raw_payments": "id order_id payment_method amount"},
    ),
    Case(
        "orders",
        """
        with orders as (select * from "shop"."main"."stg_orders"),
        payments as (select * from "shop"."main"."stg_payments"),
        order_payments as (
            select order_id,
                sum(case when payment_method = 'credit_card' then amount else 0 end)
                    as credit_card_amount,
                sum(case when payment_method = 'coupon' then amount else 0 end) as coupon_amount,
                sum(amount) as total_amount
            from payments
            group by order_id
        ),
        final as (
            select orders.order_id, orders.customer_id, orders.order_date, orders.status,
                order_payments.credit_card_amount, order_payments.coupon_amount,
                order_payments.total_amount as amount
            from orders
            left join order_payments on orders.order_id = order_payments.order_id
        )
        select * from final
        """,
        """
        order_id            stg_orders.order_id
        customer_id         stg_orders.customer_id
        order_date          stg_orders.order_date
        status              stg_orders.status
        credit_card_amount  stg_payments.amount:AGGREGATION stg_payments.payment_method:CONDITIONAL
        coupon_amount       stg_payments.amount:AGGREGATION stg_payments.payment_method:CONDITIONAL
        amount              stg_payments.amount:AGGREGATION
        """,
        "stg_orders.order_id:JOIN stg_payments.order_id:JOIN+GROUP_BY",
        sources={
            "stg_orders": "order_id customer_id order_date status",
            "stg_payments": "payment_id order_id payment_method amount",
        },
    ),
    Case(
        "customers",
        """
        with customers as (select * from "shop"."main"."stg_customers"),
        orders as (select * from "shop"."main"."stg_orders"),
        payments as (select * from "shop"."main"."stg_payments"),
        customer_orders as (
            select customer_id, min(order_date) as first_order, max(order_date) as most_recent_order,
                count(order_id) as number_of_orders
            from orders
            group by customer_id
        ),
        customer_payments as (
            select orders.customer_id, sum(amount) as total_amount
            from payments
            left join orders on payments.order_id = orders.order_id
            group by orders.customer_id
        ),
        final as (
            select customers.customer_id, customers.first_name, customers.last_name,
                customer_orders.first_order, customer_orders.most_recent_order,
                customer_orders.number_of_orders,
                customer_payments.total_amount as customer_lifetime_value
            from customers
            left join customer_orders on customers.customer_id = customer_orders.customer_id
            left join customer_payments on customers.customer_id = customer_payments.customer_id
        )
        select * from final
        """,
        """
        customer_id              stg_customers.customer_id
        first_name               stg_customers.first_name
        last_name                stg_customers.last_name
        first_order              stg_orders.order_date:AGGREGATION
        most_recent_order        stg_orders.order_date:AGGREGATION
        number_of_orders         stg_orders.order_id:AGGREGATION*
        customer_lifetime_value  stg_payments.amount:AGGREGATION
        """,
        """
        stg_customers.customer_id:JOIN stg_orders.customer_id:JOIN+GROUP_BY
        stg_orders.order_id:JOIN stg_payments.order_id:JOIN
        """,
        sources={
            "stg_customers": "customer_id first_name last_name",
            "stg_orders": "order_id customer_id order_date status",
            "stg_payments": "payment_id order_id payment_method amount",
        },
    ),
    # Stars.
    Case(
        "star over a table",
        'select * from "shop"."main"."payments"',
        "id payments.id\norder_id payments.order_id\nmethod payments.method\namount payments.amount",
    ),
    Case(
        "star of one side with columns of the other",
        """
        select o.*, c.email as contact
        from "shop"."main"."orders" o
        join "shop"."main"."customers" c on o.customer_id = c.id
        """,
        """
        id           orders.id
        customer_id  orders.customer_id
        status       orders.status
        amount       orders.amount
        ordered_at   orders.ordered_at
        contact      customers.email
        """,
        "orders.customer_id:JOIN customers.id:JOIN",
    ),
    Case(
        "star of a source by its full name, and of all but some inside a function",
        """
        select shop.main.payments.*, struct(* except (amount, method)) as keys
        from shop.main.payments
        """,
        """
        id        payments.id
        order_id  payments.order_id
        method    payments.method
        amount    payments.amount
        keys      payments.id:TRANSFORMATION payments.order_id:TRANSFORMATION
        """,
        dialect="databricks",
        relation="shop.main.{}",
    ),
    Case(
        "star exclude, replace and rename",
        """
        select * exclude (ordered_at) replace (amount / 100 as amount) rename (status as state)
        from "shop"."main"."orders"
        """,
        """
        id           orders.id
        customer_id  orders.customer_id
        state        orders.status
        amount       orders.amount:TRANSFORMATION
        """,
    ),
    Case(
        "star with USING has the key once, from the left",
        """
        select * from (select id as order_id, status from "shop"."main"."orders") o
        join "shop"."main"."payments" using (order_id)
        """,
        """
        order_id  orders.id
        status    orders.status
        id        payments.id
        method    payments.method
        amount    payments.amount
        """,
        "orders.id:JOIN payments.order_id:JOIN",
    ),
    Case(
        "star over an unknown source inside, columns named outside",
        """
        with source as (select * from raw.events)
        select event_id as id, lower(kind) as kind from source where kind is not null
        """,
        "id raw.events.event_id\nkind raw.events.kind:TRANSFORMATION",
        "raw.events.kind:FILTER",
        sources={},
    ),
    Case(
        "star over an unknown source in the result",
        'select *, 1 as version from "shop"."main"."events"',
        "version -",
        sources={"events": None},
        partial='the columns of "shop"."main"."events" are not all known',
        columns_known=False,
    ),
    # Joins.
    Case(
        "full join with USING takes either side",
        """
        select id, o.amount, p.method from "shop"."main"."orders" o
        full join "shop"."main"."payments" p using (id)
        """,
        """
        id      orders.id:TRANSFORMATION payments.id:TRANSFORMATION
        amount  orders.amount
        method  payments.method
        """,
        "orders.id:JOIN payments.id:JOIN",
    ),
    Case(
        "right join with USING takes the right side",
        """
        select id from "shop"."main"."orders" right join "shop"."main"."payments" using (id)
        """,
        "id payments.id",
        "orders.id:JOIN payments.id:JOIN",
    ),
    Case(
        "natural join",
        """
        select status, method, id
        from (select id, status from "shop"."main"."orders") a
        natural join (select id, method from "shop"."main"."payments") b
        """,
        "status orders.status\nmethod payments.method\nid orders.id",
        "orders.id:JOIN payments.id:JOIN",
    ),
    Case(
        "comma join with the condition in WHERE",
        """
        select first_name, status from "shop"."main"."orders" o, "shop"."main"."customers" c
        where o.customer_id = c.id
        """,
        "first_name customers.first_name\nstatus orders.status",
        "orders.customer_id:FILTER customers.id:FILTER",
    ),
    Case(
        "semi join's columns are not in the star",
        """
        select * from "shop"."main"."customers" c
        semi join "shop"."main"."orders" o on o.customer_id = c.id
        """,
        """
        id          customers.id
        first_name  customers.first_name
        last_name   customers.last_name
        email       customers.email
        """,
        "orders.customer_id:JOIN customers.id:JOIN",
    ),
    Case(
        "self join",
        """
        select a.id, b.amount as previous_amount
        from "shop"."main"."orders" a
        left join "shop"."main"."orders" b on a.customer_id = b.customer_id and b.id < a.id
        """,
        "id orders.id\nprevious_amount orders.amount",
        "orders.customer_id:JOIN orders.id:JOIN",
    ),
    Case(
        "joins in parentheses",
        """
        select c.email, p.method from "shop"."main"."customers" c
        left join ("shop"."main"."orders" o join "shop"."main"."payments" p on p.order_id = o.id)
        on c.id = o.customer_id
        """,
        "email customers.email\nmethod payments.method",
        "payments.order_id:JOIN orders.id:JOIN customers.id:JOIN orders.customer_id:JOIN",
    ),
    Case(
        "lateral subquery",
        """
        select c.id, last_order.amount from "shop"."main"."customers" c
        left join lateral (
            select amount from "shop"."main"."orders" o
            where o.customer_id = c.id order by ordered_at desc limit 1
        ) last_order on true
        """,
        "id customers.id\namount orders.amount",
        "orders.customer_id:FILTER customers.id:FILTER orders.ordered_at:SORT",
        dialect="postgres",
    ),
    # Common table expressions and derived tables.
    Case(
        "nested common table expressions, shadowing the table's name",
        """
        with orders as (
            with orders as (select id, amount from "shop"."main"."orders")
            select id, amount * 2 as amount from orders
        )
        select id, amount + 1 as amount from orders
        """,
        "id orders.id\namount orders.amount:TRANSFORMATION",
    ),
    Case(
        "a common table expression that nobody reads",
        """
        with unused as (select id from "shop"."main"."payments" where method = 'x')
        select id from "shop"."main"."orders"
        """,
        "id orders.id",
    ),
    Case(
        "column list of a common table expression and of a derived table",
        """
        with c(key, mail) as (select id, email from "shop"."main"."customers")
        select key, mail, d.total
        from c join (select customer_id, sum(amount) from "shop"."main"."orders" group by 1)
            d(who, total) on who = key
        """,
        "key customers.id\nmail customers.email\ntotal orders.amount:AGGREGATION",
        "orders.customer_id:JOIN+GROUP_BY customers.id:JOIN",
    ),
    Case(
        "recursive: swapped columns need more than one round",
        """
        with recursive chain as (
            select id as a, customer_id as b, 1 as n from "shop"."main"."orders"
            union all
            select b, a, n + 1 from chain where n < 3
        )
        select a, b from chain
        """,
        """
        a  orders.id orders.customer_id
        b  orders.customer_id orders.id
        """,
    ),
    Case(
        "recursive numbers have no source",
        """
        with recursive n as (select 1 as i union all select i + 1 from n where i < 9)
        select i from n
        """,
        "i -",
    ),
    Case(
        "ephemeral models",
        """
        with __dbt__cte__eph_orders as (
            select id, customer_id, amount from "shop"."main"."orders" where status = 'paid'
        ), __dbt__cte__eph_totals as (
            select customer_id, sum(amount) as total from __dbt__cte__eph_orders group by 1
        )
        select c.email, t.total
        from "shop"."main"."customers" c
        join __dbt__cte__eph_totals t on t.customer_id = c.id
        """,
        "email customers.email\ntotal orders.amount:AGGREGATION",
        "orders.status:FILTER orders.customer_id:GROUP_BY+JOIN customers.id:JOIN",
    ),
    # Set operations.
    Case(
        "union all matches by place",
        """
        select id, amount from "shop"."main"."orders"
        union all
        select order_id, amount from "shop"."main"."payments"
        """,
        "id orders.id payments.order_id\namount orders.amount payments.amount",
    ),
    Case(
        "union distinct groups by all",
        """
        select id as key from "shop"."main"."orders" union select id from "shop"."main"."customers"
        """,
        "key orders.id customers.id",
        "orders.id:GROUP_BY customers.id:GROUP_BY",
    ),
    Case(
        "union by name",
        """
        select id, amount from "shop"."main"."orders"
        union all by name
        select method, id from "shop"."main"."payments"
        """,
        "id orders.id payments.id\namount orders.amount\nmethod payments.method",
    ),
    Case(
        "except compares both sides and takes the left",
        """
        select id from "shop"."main"."customers"
        except
        select customer_id from "shop"."main"."orders"
        """,
        "id customers.id",
        "customers.id:FILTER orders.customer_id:FILTER",
    ),
    Case(
        "intersect has values of both sides",
        """
        select id from "shop"."main"."customers"
        intersect
        select customer_id from "shop"."main"."orders"
        """,
        "id customers.id orders.customer_id",
        "customers.id:FILTER orders.customer_id:FILTER",
    ),
    Case(
        "three arms of unlike kinds, sorted by the result's name",
        """
        select id, email as label from "shop"."main"."customers"
        union all
        select id, upper(status) from "shop"."main"."orders"
        union all
        select 0, 'none'
        order by label
        """,
        "id customers.id orders.id\nlabel customers.email orders.status:TRANSFORMATION",
        "customers.email:SORT orders.status:SORT",
    ),
    # Expressions.
    Case(
        "case: what decides and what is given",
        """
        select
            case when status = 'paid' then amount when ordered_at is null then id else 0 end as simple,
            case status when 'a' then amount end as searched,
            sum(case when status = 'paid' then amount end) over (partition by customer_id) as paid
        from "shop"."main"."orders"
        """,
        """
        simple    orders.amount:TRANSFORMATION orders.id:TRANSFORMATION orders.status:CONDITIONAL orders.ordered_at:CONDITIONAL
        searched  orders.amount:TRANSFORMATION orders.status:CONDITIONAL
        paid      orders.amount:AGGREGATION orders.status:CONDITIONAL orders.customer_id:WINDOW
        """,
    ),
    Case(
        "the same column decides and is given",
        'select case when amount > 0 then amount end as positive from "shop"."main"."orders"',
        "positive orders.amount:TRANSFORMATION+CONDITIONAL",
    ),
    Case(
        "functions that choose",
        """
        select coalesce(email, last_name) as a, if(id > 5, first_name, last_name) as b,
            nullif(email, last_name) as c, greatest(id, 3) as d, email is null as e
        from "shop"."main"."customers"
        """,
        """
        a  customers.email:TRANSFORMATION customers.last_name:TRANSFORMATION
        b  customers.id:CONDITIONAL customers.first_name:TRANSFORMATION customers.last_name:TRANSFORMATION
        c  customers.email:TRANSFORMATION customers.last_name:CONDITIONAL
        d  customers.id:TRANSFORMATION
        e  customers.email:TRANSFORMATION
        """,
    ),
    Case(
        "casts, constants, concatenation, parentheses",
        """
        select cast(id as varchar) as text_id, id::bigint as big_id, (email) as email,
            first_name || ' ' || last_name as full_name, 'x' as constant, current_date as today,
            null as nothing
        from "shop"."main"."customers"
        """,
        """
        text_id    customers.id:TRANSFORMATION
        big_id     customers.id:TRANSFORMATION
        email      customers.email
        full_name  customers.first_name:TRANSFORMATION customers.last_name:TRANSFORMATION
        constant   -
        today      -
        nothing    -
        """,
    ),
    Case(
        "hashes and counts cannot be read back",
        """
        select md5(cast(coalesce(cast(id as text), '') || '-' || email as text)) as key,
            sha256(email) as mail_hash, upper(email) as mail
        from "shop"."main"."customers"
        """,
        """
        key        customers.id:TRANSFORMATION* customers.email:TRANSFORMATION*
        mail_hash  customers.email:TRANSFORMATION*
        mail       customers.email:TRANSFORMATION
        """,
    ),
    Case(
        "a column that is both hashed and shown is not masked",
        'select md5(email) || email as both from "shop"."main"."customers"',
        "both customers.email:TRANSFORMATION",
    ),
    Case(
        "an alias used by later columns",
        """
        select amount / 100 as dollars, dollars * 2 as doubled, sum(dollars) over () as total
        from "shop"."main"."orders"
        """,
        """
        dollars  orders.amount:TRANSFORMATION
        doubled  orders.amount:TRANSFORMATION
        total    orders.amount:AGGREGATION
        """,
    ),
    Case(
        "an alias that a column of the source hides",
        'select id as amount, amount + 1 as more from "shop"."main"."orders"',
        "amount orders.id\nmore orders.amount:TRANSFORMATION",
    ),
    Case(
        "lambdas and comprehensions have names of their own",
        """
        select list_transform(tags, x -> x || suffix) as a, [t || suffix for t in tags] as b,
            list_filter(tags, x -> x is not null) as c
        from "shop"."main"."posts"
        """,
        """
        a  posts.tags:TRANSFORMATION posts.suffix:TRANSFORMATION
        b  posts.tags:TRANSFORMATION posts.suffix:TRANSFORMATION
        c  posts.tags:TRANSFORMATION
        """,
        sources={"posts": "tags suffix t"},
    ),
    Case(
        "fields of structs",
        """
        select address.city as city, p.address.zip as zip, {'a': id, 'b': address} as packed,
            p.id as id
        from "shop"."main"."people" p
        """,
        """
        city    people.address:TRANSFORMATION
        zip     people.address:TRANSFORMATION
        packed  people.id:TRANSFORMATION people.address:TRANSFORMATION
        id      people.id
        """,
        sources={"people": "id address"},
    ),
    Case(
        "a whole row as a value",
        """
        select to_json(c) as row, hash(c) as row_hash, count(*) over () as n
        from (select id, email from "shop"."main"."customers") c
        """,
        """
        row       customers.id:TRANSFORMATION customers.email:TRANSFORMATION
        row_hash  customers.id:TRANSFORMATION* customers.email:TRANSFORMATION*
        n         -
        """,
    ),
    Case(
        "all columns as a value",
        """
        select hash(*) as row_hash, hash(c.*) as same
        from (select id, email from "shop"."main"."customers") c
        """,
        """
        row_hash  customers.id:TRANSFORMATION* customers.email:TRANSFORMATION*
        same      customers.id:TRANSFORMATION* customers.email:TRANSFORMATION*
        """,
        dialect="redshift",
    ),
    # Aggregates and windows.
    Case(
        "aggregates",
        """
        select customer_id, count(*) as n, count(distinct status) as kinds, sum(amount) as total,
            avg(amount + 1) as mean, max(ordered_at) as last_at,
            count(*) filter (where status = 'paid') as paid,
            sum(amount) filter (where status = 'paid') as paid_amount,
            string_agg(status, ',' order by ordered_at) as history,
            arg_max(status, ordered_at) as last_status,
            round(sum(amount) / count(id), 2) as per_order
        from "shop"."main"."orders"
        group by customer_id
        """,
        """
        customer_id  orders.customer_id
        n            -
        kinds        orders.status:AGGREGATION*
        total        orders.amount:AGGREGATION
        mean         orders.amount:AGGREGATION
        last_at      orders.ordered_at:AGGREGATION
        paid         orders.status:FILTER
        paid_amount  orders.amount:AGGREGATION orders.status:FILTER
        history      orders.status:AGGREGATION orders.ordered_at:SORT
        last_status  orders.status:AGGREGATION orders.ordered_at:SORT
        per_order    orders.amount:AGGREGATION orders.id:AGGREGATION*
        """,
        "orders.customer_id:GROUP_BY",
    ),
    Case(
        "an aggregate of an aggregate, and of a case outside",
        """
        with daily as (
            select ordered_at, sum(amount) as total from "shop"."main"."orders" group by 1
        )
        select max(total) as best, case when max(total) > 5 then 'good' end as verdict from daily
        """,
        "best orders.amount:AGGREGATION\nverdict orders.amount:CONDITIONAL",
        "orders.ordered_at:GROUP_BY",
    ),
    Case(
        "ordered-set aggregates",
        """
        select percentile_cont(0.5) within group (order by amount) as median_amount,
            listagg(status, ',') within group (order by id) as statuses
        from "shop"."main"."orders"
        """,
        """
        median_amount  orders.amount:AGGREGATION
        statuses       orders.status:AGGREGATION orders.id:SORT
        """,
        dialect="redshift",
    ),
    Case(
        "windows",
        """
        select row_number() over (partition by customer_id order by ordered_at) as nth,
            sum(amount) over w as running, lag(amount) over w as previous,
            first_value(status) over (order by id) as first_status
        from "shop"."main"."orders"
        window w as (partition by customer_id order by ordered_at)
        """,
        """
        nth           orders.customer_id:WINDOW orders.ordered_at:WINDOW
        running       orders.amount:AGGREGATION orders.customer_id:WINDOW orders.ordered_at:WINDOW
        previous      orders.amount:TRANSFORMATION orders.customer_id:WINDOW orders.ordered_at:WINDOW
        first_status  orders.status:TRANSFORMATION orders.id:WINDOW
        """,
    ),
    Case(
        "the last order of each customer, by a window and a filter outside",
        """
        with ranked as (
            select *, row_number() over (partition by customer_id order by ordered_at desc) as rn
            from "shop"."main"."orders"
        )
        select id, amount, rn from ranked where rn = 1
        """,
        "id orders.id\namount orders.amount\nrn orders.customer_id:WINDOW orders.ordered_at:WINDOW",
        "orders.customer_id:FILTER orders.ordered_at:FILTER",
    ),
    Case(
        "the same with QUALIFY, by alias and by expression",
        """
        select id, row_number() over (partition by customer_id order by ordered_at desc) as rn
        from "shop"."main"."orders"
        qualify rn = 1 and count(*) over (partition by status) > 1
        """,
        "id orders.id\nrn orders.customer_id:WINDOW orders.ordered_at:WINDOW",
        "orders.customer_id:FILTER orders.ordered_at:FILTER orders.status:FILTER",
    ),
    # What decides on rows.
    Case(
        "where, having, group by number and by alias, order by",
        """
        select date_trunc('month', ordered_at) as month, status, sum(amount) as total
        from "shop"."main"."orders"
        where id > 10
        group by month, 2
        having count(customer_id) > 1
        order by total desc, 1
        """,
        """
        month   orders.ordered_at:TRANSFORMATION
        status  orders.status
        total   orders.amount:AGGREGATION
        """,
        """
        orders.id:FILTER orders.ordered_at:GROUP_BY+SORT orders.status:GROUP_BY
        orders.customer_id:FILTER orders.amount:SORT
        """,
    ),
    Case(
        "group by all",
        """
        select customer_id, upper(status) as status, sum(amount) as total
        from "shop"."main"."orders" group by all
        """,
        """
        customer_id  orders.customer_id
        status       orders.status:TRANSFORMATION
        total        orders.amount:AGGREGATION
        """,
        "orders.customer_id:GROUP_BY orders.status:GROUP_BY",
    ),
    Case(
        "grouping sets",
        """
        select customer_id, status, sum(amount) as total from "shop"."main"."orders"
        group by grouping sets ((1), (customer_id, status), ())
        """,
        "customer_id orders.customer_id\nstatus orders.status\ntotal orders.amount:AGGREGATION",
        "orders.customer_id:GROUP_BY orders.status:GROUP_BY",
    ),
    Case(
        "distinct, and an inner order that decides nothing",
        """
        select distinct status from (select status, id from "shop"."main"."orders" order by id)
        """,
        "status orders.status",
        "orders.status:GROUP_BY",
    ),
    Case(
        "distinct on",
        """
        select distinct on (customer_id) customer_id, amount from "shop"."main"."orders"
        order by customer_id, ordered_at desc
        """,
        "customer_id orders.customer_id\namount orders.amount",
        "orders.customer_id:GROUP_BY+SORT orders.ordered_at:SORT",
        dialect="postgres",
    ),
    # Subqueries.
    Case(
        "scalar subquery, correlated: its filter decides on its column only",
        """
        select c.id, (
            select max(o.amount) from "shop"."main"."orders" o where o.customer_id = c.id
        ) as biggest
        from "shop"."main"."customers" c
        """,
        """
        id       customers.id
        biggest  orders.amount:AGGREGATION orders.customer_id:FILTER customers.id:FILTER
        """,
    ),
    Case(
        "IN and EXISTS in WHERE",
        """
        select email from "shop"."main"."customers" c
        where id in (select customer_id from "shop"."main"."orders" where status = 'paid')
          and not exists (
            select 1 from "shop"."main"."payments" p where p.order_id = c.id and method = 'coupon'
          )
        """,
        "email customers.email",
        """
        customers.id:FILTER orders.customer_id:FILTER orders.status:FILTER
        payments.order_id:FILTER payments.method:FILTER
        """,
    ),
    Case(
        "an incremental model",
        """
        select id, amount from "shop"."main"."orders"
        where ordered_at > (select max(ordered_at) from "shop"."main"."target")
        """,
        "id orders.id\namount orders.amount",
        "orders.ordered_at:FILTER target.ordered_at:FILTER",
        sources={**SHOP, "target": "id amount ordered_at"},
    ),
    # Sources that are no tables.
    Case(
        "values",
        """
        select o.id, v.label from "shop"."main"."orders" o
        join (values ('a', 'Open'), ('b', 'Paid')) as v(code, label) on v.code = o.status
        """,
        "id orders.id\nlabel -",
        "orders.status:JOIN",
    ),
    Case(
        "unnest",
        """
        select p.id, t.tag from "shop"."main"."posts" p, unnest(p.tags) as t(tag)
        """,
        "id posts.id\ntag posts.tags:TRANSFORMATION",
        "posts.tags:JOIN",
        sources={"posts": "id tags"},
    ),
    Case(
        "a series",
        "select n, n * 2 as twice from generate_series(1, 10) as g(n)",
        "n -\ntwice -",
    ),
    Case(
        "a file",
        "select id, upper(name) as name from 'data/people.parquet'",
        'id "data/people.parquet".id\nname "data/people.parquet".name:TRANSFORMATION',
        sources={},
    ),
    Case(
        "pivot",
        """
        select * from (select customer_id, status, amount from shop.main.orders)
        pivot (sum(amount) for status in ('paid' as paid, 'open' as still_open))
        """,
        """
        CUSTOMER_ID  ORDERS.CUSTOMER_ID
        PAID         ORDERS.AMOUNT:AGGREGATION ORDERS.STATUS:CONDITIONAL
        STILL_OPEN   ORDERS.AMOUNT:AGGREGATION ORDERS.STATUS:CONDITIONAL
        """,
        "ORDERS.CUSTOMER_ID:GROUP_BY",
        dialect="snowflake",
        relation="SHOP.MAIN.{}",
        sources={"ORDERS": "CUSTOMER_ID STATUS AMOUNT"},
    ),
    Case(
        "unpivot",
        """
        select * from (select id, first_name, last_name from "shop"."main"."customers")
        unpivot (name for part in (first_name, last_name))
        """,
        """
        id    customers.id
        part  -
        name  customers.first_name customers.last_name
        """,
        "customers.first_name:FILTER customers.last_name:FILTER",
    ),
    Case(
        "snapshot",
        """
        select id, status from "shop"."main"."orders"
        """,
        """
        id              orders.id
        status          orders.status
        dbt_scd_id      -
        dbt_updated_at  -
        dbt_valid_from  -
        dbt_valid_to    -
        """,
        added=("dbt_scd_id", "dbt_updated_at", "dbt_valid_from", "dbt_valid_to"),
    ),
    # What is not certain.
    Case(
        "a column that may be of either unknown table",
        """
        select a.id, label from raw.a join raw.b on a.id = b.id
        """,
        "id raw.a.id\nlabel ?",
        "raw.a.id:JOIN raw.b.id:JOIN",
        sources={},
        partial="label may be a column of raw.a or raw.b",
    ),
    Case(
        "a column of the only table whose columns are not known",
        """
        select o.id, label from "shop"."main"."orders" o join raw.b on o.id = b.id
        """,
        "id orders.id\nlabel raw.b.label",
        "orders.id:JOIN raw.b.id:JOIN",
    ),
    Case(
        "an alias or a column of an unknown table",
        "select a + 1 as b, b * 2 as c from raw.t",
        "b raw.t.a:TRANSFORMATION\nc ?",
        sources={},
        partial="b may be an alias or a column",
    ),
    Case(
        "a dialect in which that cannot be an alias",
        "select a + 1 as b, b * 2 as c from raw.t",
        "b raw.t.a:TRANSFORMATION\nc raw.t.b:TRANSFORMATION",
        dialect="postgres",
        sources={},
    ),
    Case(
        "a column that the known ones do not have",
        'select o.id, o.added_lately from "shop"."main"."orders" o',
        "id orders.id\nadded_lately orders.added_lately",
        partial="added_lately is not a known column",
    ),
    Case(
        "a union with an unknown star",
        """
        select id, amount from "shop"."main"."orders" union all select * from raw.old_orders
        """,
        "id ?\namount ?",
        partial="the columns of raw.old_orders are not known",
    ),
    Case(
        "columns picked by a pattern",
        'select id, columns(\'a.*\') from "shop"."main"."orders"',
        "id orders.id",
        partial="the columns of a COLUMNS are not all known",
        columns_known=False,
    ),
    Case(
        "two columns of the same name",
        """
        select o.id, c.id, email from "shop"."main"."orders" o cross join "shop"."main"."customers" c
        """,
        "email customers.email",
        partial="several columns named id",
        columns_known=False,
    ),
    Case(
        "a column without a name",
        'select id, count(*) over () from "shop"."main"."orders"',
        "id orders.id",
        partial="column 2 has no name",
        columns_known=False,
    ),
    # Dialects.
    Case(
        "snowflake: unquoted is upper case, quoted stays",
        """
        with src as (select * from SHOP.MAIN.ORDERS)
        select id, Amount as total, "status" as "kept", upper(src."status") as Up from src
        where customer_id is not null
        """,
        """
        ID     orders.ID
        TOTAL  orders.AMOUNT
        kept   orders.status
        UP     orders.status:TRANSFORMATION
        """,
        "orders.CUSTOMER_ID:FILTER",
        dialect="snowflake",
        relation="SHOP.MAIN.{}",
        sources={"orders": "ID AMOUNT status CUSTOMER_ID"},
    ),
    Case(
        "snowflake: flatten and paths",
        """
        select t.id, f.value:sku::string as sku, f.index as line, doc:customer.name as name
        from shop.main.docs t, lateral flatten(input => t.doc:items) f
        qualify row_number() over (partition by t.id order by line) = 1
        """,
        """
        ID    docs.ID
        SKU   docs.DOC:TRANSFORMATION
        LINE  docs.DOC:TRANSFORMATION
        NAME  docs.DOC:TRANSFORMATION
        """,
        "docs.ID:FILTER docs.DOC:FILTER+JOIN",
        dialect="snowflake",
        relation="shop.main.{}",
        sources={"docs": "ID DOC"},
    ),
    Case(
        "bigquery: backticks, except, unnest, offset, safe_cast",
        """
        with base as (select * except (secret) from `my-project`.`shop`.`orders`)
        select b.id, item.sku, safe_cast(item.price as numeric) as price, pos
        from base b, unnest(b.items) as item with offset as pos
        """,
        """
        id     orders.id
        sku    orders.items:TRANSFORMATION
        price  orders.items:TRANSFORMATION
        pos    -
        """,
        "orders.items:JOIN",
        dialect="bigquery",
        relation="`my-project`.`shop`.`{}`",
        sources={"orders": "id items secret"},
    ),
    Case(
        "bigquery: one pair of backticks, and an array of each row in FROM",
        "select o.id, line.sku from `my-project.shop.orders` o, o.items as line",
        "id orders.id\nsku orders.items:TRANSFORMATION",
        "orders.items:JOIN",
        dialect="bigquery",
        relation="`my-project`.`shop`.`{}`",
        sources={"orders": "id items"},
    ),
    Case(
        "postgres: lower case unless quoted, casts keep the name",
        """
        select ID::text, "Mixed" as "Kept", max(Amount) over () as TOP
        from "shop"."main"."orders"
        """,
        """
        id    orders.id:TRANSFORMATION
        Kept  orders.Mixed
        top   orders.amount:AGGREGATION
        """,
        dialect="postgres",
        sources={"orders": "id Mixed amount"},
    ),
    Case(
        "redshift: everything is lower case",
        """
        select Id as "KEY", listagg(Status, ',') within group (order by Amount) as All_Statuses
        from "shop"."main"."orders" group by 1
        """,
        """
        key           orders.id
        all_statuses  orders.status:AGGREGATION orders.amount:SORT
        """,
        "orders.id:GROUP_BY",
        dialect="redshift",
    ),
    Case(
        "databricks: explode, backticks, lateral aliases",
        """
        select id, tag, amount * 2 as twice, twice + 1 as more
        from `shop`.`main`.`orders` lateral view explode(tags) t as tag
        """,
        """
        id     orders.id
        tag    orders.tags:TRANSFORMATION
        twice  orders.amount:TRANSFORMATION
        more   orders.amount:TRANSFORMATION
        """,
        "orders.tags:JOIN",
        dialect="databricks",
        relation="`shop`.`main`.`{}`",
        sources={"orders": "id amount tags"},
    ),
    Case(
        "sqlserver: apply, top, brackets",
        """
        select top 10 c.[id], last_one.amount from [shop].[main].[customers] c
        outer apply (select max(o.amount) as amount from [shop].[main].[orders] o
                     where o.customer_id = c.id) last_one
        """,
        "id customers.id\namount orders.amount:AGGREGATION",
        "orders.customer_id:FILTER customers.id:FILTER",
        dialect="sqlserver",
    ),
]
